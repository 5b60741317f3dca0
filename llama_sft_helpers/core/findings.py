"""What a legitimate run may give: findings with advice, shown once the results are saved, never raised."""

FEW_ROWS = 30  # held-out rows below which a difference may well be luck
LEVEL = 0.01  # a held-out loss that rose by less than this share of itself is taken for level
