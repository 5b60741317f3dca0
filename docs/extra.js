// The theme's search box has no name for those who hear the page, and its boxes that scroll take no key.
document.querySelector(".md-search").ariaLabel = document.querySelector(".md-search__input").placeholder;
addEventListener("load", () => {
  for (const box of document.querySelectorAll(".output, .md-typeset__scrollwrap, math[display=block]")) box.tabIndex = 0;
});
