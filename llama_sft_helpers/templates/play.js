// The page: reads the controls, asks play_model.js, and writes and draws what it says.
const DATA = JSON.parse(document.getElementById("data").textContent);
const TEXTS = JSON.parse(document.getElementById("texts").textContent); // English -> the page's language
const GROUPS = ["blue", "sky", "green", "green", "green", "orange", "rose", "rose", "grey", "grey"]; // of the plan's components
const MARKS = { completion: "«»", eos: "«»", lost: "[]" }; // around tokens of a role, for those who see no colours

const inform = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });
const precise = (value, digits = 3) => value.toLocaleString("en", { maximumSignificantDigits: digits });
const percent = (share) => `${precise(100 * share)}%`;

// A text in the page's language, with values put into its {...}; `many` chooses between one and several.
function t(text, values = {}) {
  return (TEXTS[text] ?? text).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

const many = (count, one, several) => t(count === 1 ? one : several, { n: inform(count) });

function make(tag, attributes = {}, ...children) {
  const drawn = ["svg", "rect", "line", "circle", "text", "title"].includes(tag);
  const node = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A section's sentence, its tiles of name, value and remark, and whether it is bad news.
function say(section, sentence, tiles = [], bad = false) {
  const said = section.querySelector(".said");
  if (said.textContent !== sentence) said.textContent = sentence;
  said.classList.toggle("bad", bad);
  section.querySelector(".tiles")?.replaceChildren(
    ...tiles.map(([name, value, note]) =>
      make("li", {}, name, make("strong", {}, value), make("span", { class: "soft" }, note))),
  );
}

// A drawing in the width that is there, so that its letters stay as large on a phone; `words` say what it shows.
function draw(section, height, words, paint) {
  const box = section.querySelector(".figure");
  const width = box.clientWidth;
  const shapes = paint(width);
  box.replaceChildren(make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words }, ...shapes));
}

const rect = (x, y, width, height, colour) =>
  make("rect", { x, y, width: Math.max(width, 0), height, rx: 2, style: `fill: var(--${colour})` });
const line = (x1, y1, x2, y2, colour, attributes = {}) =>
  make("line", { x1, y1, x2, y2, style: `stroke: var(--${colour})`, ...attributes });
const label = (x, y, text, attributes = {}) => make("text", { x, y, ...attributes }, text);

// Horizontal bars: name, value, what stands behind the bar, colour.
function bars(rows, width, top = 0) {
  const names = Math.min(170, width * 0.44);
  const room = width - names - 85;
  const largest = Math.max(...rows.map((row) => row.value)) || 1;
  return rows.flatMap(({ name, value, text, colour, bold }, i) => {
    const y = top + 26 * i;
    const length = (value / largest) * room;
    const weight = bold ? { "font-weight": 700 } : {};
    return [
      label(names - 8, y + 17, name, { "text-anchor": "end", ...weight }),
      rect(names, y + 4, length, 18, colour),
      label(names + length + 6, y + 17, text, weight),
    ];
  });
}

const sections = {
  grid(section, form) {
    const [bits, absmax, outlier] = [form.bits, form.absmax, form.outlier].map((field) => Number(field.value));
    show(form.outlier, outlier === 1 ? t("none") : String(outlier));
    const { weights, codes, step, error } = quantizeRow(DATA, bits, absmax, outlier);
    const levels = 2 ** bits - 1;
    const zeros = codes.filter((code, i) => code === 0 && weights[i] !== 0).length;
    const used = new Set(codes).size;
    const found = { levels: inform(levels), step: precise(step), error: percent(error), others: weights.length - 1 };
    const sentence = outlier > 1
      ? t("{levels} levels, {step} apart: the other {others} weights' rounding error is {error}.", found)
      : t("{levels} levels, {step} apart: the row's rounding error is {error}.", found);
    say(section, sentence, [
      [t("Step"), precise(step), t("from level to level")],
      [t("Relative error"), percent(error), outlier > 1 ? t("of all but the outlier") : t("norm of the errors / norm of the row")],
      [t("Rounded to 0"), t("{n} of {all}", { n: zeros, all: weights.length }), t("weights that are lost")],
      [t("Levels in use"), t("{n} of {all}", { n: used, all: levels }), t("by these weights")],
    ]);
    const height = 250;
    const words = [
      t("{n} weights before and after rounding.", { n: weights.length }),
      sentence,
      many(zeros, "{n} weight becomes 0.", "{n} weights become 0."),
    ].join(" ");
    draw(section, height, words, (width) => paintGrid(width, height, { weights, codes, step, absmax }));
  },

  lora(section, form) {
    const [r, alpha] = [form.r, form.alpha].map((field) => Number(field.value));
    const targets = [...form.target].filter((box) => box.checked).map((box) => box.value);
    if (!targets.length) {
      say(section, t("Choose at least one target module."), [], true);
      section.querySelector(".figure").replaceChildren();
      return;
    }
    const { parts, parameters, mib, share } = planAdapter(DATA, r, targets);
    const counted = { n: inform(parameters), share: percent(share) };
    const sentence = t("{n} trainable parameters, {share} of Llama 3 8B with its adapter.", counted);
    say(section, sentence, [
      [t("Adapter's file"), `${inform(mib, 1)} MiB`, t("in float32")],
      [t("Beside it in training"), `${inform(3 * mib, 1)} MiB`, t("gradients and AdamW's two averages")],
      [t("Scaling α / r"), precise(alpha / r), t("α changes no count")],
    ]);
    const rows = parts.map(([name, size]) => ({ name, value: size, text: `${precise(size / 1e6)} M`, colour: "blue" }));
    const words = t("Parameters by module: {list}.", { list: listed(rows) });
    draw(section, 26 * rows.length, words, (width) => bars(rows, width));
  },

  tokens(section, form) {
    const row = { instruction: form.instruction.value, input: form.input.value, output: form.output.value };
    const limit = Number(form.limit.value);
    const box = section.querySelector(".pieces");
    if (!strip(row.output)) {
      say(section, t("The answer is empty: the series refuses such a row."), [], true);
      box.replaceChildren();
      return;
    }
    const cut = maskRow(DATA, row, limit);
    const whole = maskRow(DATA, row, Infinity);
    const dropped = cut.scored === 0;
    const sentence = dropped
      ? t("Dropped: the prompt alone has {n} tokens, so no answer is left to score.", { n: inform(cut.prompt) })
      : cut.eos
        ? t("Kept whole: {n} of {all} tokens are scored, EOS among them.", { n: inform(cut.scored), all: inform(cut.tokens) })
        : many(cut.tokens - limit - 1, "Cut: EOS is lost, and with it {n} token of the answer.", "Cut: EOS is lost, and with it {n} tokens of the answer.");
    const sizes = { prompt: inform(whole.prompt), answer: inform(whole.scored), share: percent(cut.scored / cut.pieces.length) };
    say(section, sentence, [
      [t("Tokens"), inform(cut.tokens), t("{prompt} of the prompt, {answer} of the answer with EOS", sizes)],
      [t("Scored"), inform(cut.scored), dropped ? t("trl drops the row") : t("{share} of what is read", sizes)],
      ["EOS", cut.eos ? t("scored") : t("lost"), cut.eos ? t("the model learns to stop") : t("nothing teaches it to stop")],
    ], !cut.eos);
    const roles = whole.pieces.map((_, i) => cut.roles[i] ?? "lost");
    box.replaceChildren(...whole.pieces.flatMap((piece, i) => [
      roles[i] === roles[i - 1] ? "" : (MARKS[roles[i]]?.[0] ?? ""),
      make("span", { class: roles[i] }, textOf(piece)),
      roles[i] === roles[i + 1] ? "" : (MARKS[roles[i]]?.[1] ?? ""),
      /Ċ$/.test(piece) && whole.pieces[i + 1] !== "Ċ" ? make("br") : "", // Ċ is a line end
    ]));
  },

  memory(section, form) {
    const card = DATA.memory.cards[form.card.value];
    const [batch, length] = [Number(form.batch.value), Number(form.max_length.value)];
    show(form.batch, inform(card.batches[batch]));
    show(form.max_length, inform(card.lengths[length]));
    const plan = planMemory(DATA, form.card.value, form.checkpointing.checked, batch, length);
    const fits = { fits: t("It fits"), tight: t("It is tight"), "does not fit": t("It does not fit") }[plan.verdict];
    const change = plan.change ? ` ${t("Change: {change}.", { change: plan.change.replaceAll("=", " = ") })}` : "";
    const needed = t("{n} of {all} GiB", { n: plan.total.toFixed(1), all: card.gib.toFixed(1) });
    const sentence = `${fits}: ${needed}, ${inform((100 * plan.total) / card.gib)}%.${change}`;
    say(section, sentence, [], plan.verdict !== "fits");
    const rows = DATA.memory.components.map((name, i) => ({
      name: t(name), value: plan.gib[i], text: `${inform(plan.gib[i], 2)} GiB`, colour: GROUPS[i],
    }));
    const words = `${sentence} ${t("By component: {list}.", { list: listed(rows) })}`;
    draw(section, 76 + 26 * rows.length, words, (width) => [
      ...paintStack(width, rows, plan.total, card.gib),
      ...bars(rows, width, 76),
    ]);
  },

  cost(section, form) {
    const epochs = Number(form.epochs.value);
    const [rows, rowTokens, price] = [form.rows, form.row_tokens, form.price].map((field) => Number(field.value));
    show(form.price, price.toFixed(2));
    if (!(rows >= 1 && rowTokens >= 1)) {
      say(section, t("The rows and their tokens must be numbers of at least 1."), [], true);
      return;
    }
    const tokens = rows * rowTokens * epochs;
    const found = Object.fromEntries(DATA.speed.rungs.map(({ rung }) => [rung, planEpoch(DATA, rung, tokens, price)]));
    const chosen = form.rung.value;
    const { change, speed } = DATA.speed.rungs.find(({ rung }) => rung === chosen);
    const spent = { rung: chosen, time: duration(found[chosen].hours), price: found[chosen].price.toFixed(2) };
    const sentence = t("“{rung}” takes {time} and costs {price}.", spent);
    const first = DATA.speed.rungs[0];
    say(section, sentence, [
      [t("Tokens"), inform(tokens), t("{epochs} of {rows}", { epochs: many(epochs, "{n} epoch", "{n} epochs"), rows: many(rows, "{n} row", "{n} rows") })],
      [t("Tokens a second"), inform(speed), t(change)],
      [t("Against “plain”"), t("{n} times as fast", { n: precise(speed / first.speed) }), t("plain costs {price}", { price: found[first.rung].price.toFixed(2) })],
    ]);
    const lengths = DATA.speed.rungs.map(({ rung }) => ({
      name: rung, value: found[rung].hours, text: duration(found[rung].hours),
      colour: rung === chosen ? "orange" : "blue", bold: rung === chosen,
    }));
    const words = t("Time by rung: {list}.", { list: listed(lengths) });
    draw(section, 26 * lengths.length, words, (width) => bars(lengths, width));
  },
};

function listed(rows) {
  return rows.map((row) => `${row.name} ${row.text}`).join(", ");
}

function duration(hours) {
  if (hours >= 1.995) return t("{n} h", { n: precise(hours) });
  return hours * 60 >= 1 ? t("{n} min", { n: precise(hours * 60) }) : t("{n} s", { n: precise(hours * 3600) });
}

// Weights from left to right, their value upwards: a ring before rounding, a dot on its level after.
function paintGrid(width, height, { weights, codes, step, absmax }) {
  const [left, top, bottom] = [52, 16, 22];
  const near = codes.map((code) => Math.abs(code * step)).filter((_, i) => Math.abs(weights[i]) <= absmax * 1.001);
  const reach = 1.08 * Math.max(absmax, ...near);
  const y = (value) => top + ((reach - value) / (2 * reach)) * (height - top - bottom);
  const x = (i) => left + ((i + 0.5) / weights.length) * (width - left - 6);
  const shapes = [];
  const highest = Math.floor(reach / step);
  const gap = y(0) - y(step);
  for (let level = -highest; gap >= 2 && level <= highest; level++) {
    shapes.push(line(left, y(level * step), width, y(level * step), level ? "edge" : "soft"));
  }
  for (const value of [absmax, 0, -absmax]) {
    shapes.push(label(left - 6, y(value) + 4, precise(value), { "text-anchor": "end", class: "soft" }));
  }
  weights.forEach((weight, i) => {
    if (Math.abs(weight) > reach) { // the outlier, far above the picture
      shapes.push(line(x(i), y(0), x(i), top - 2, "orange", { "stroke-width": 2 }));
      const anchor = i * 2 < weights.length ? "start" : "end";
      shapes.push(label(x(i) + (anchor === "start" ? 6 : -6), top - 3, t("outlier {weight}, far above", { weight: precise(weight) }), { "text-anchor": anchor }));
      return;
    }
    shapes.push(line(x(i), y(weight), x(i), y(codes[i] * step), "orange", { "stroke-width": 2 }));
    shapes.push(make("circle", { cx: x(i), cy: y(weight), r: 4.5, style: "fill: none; stroke: var(--soft); stroke-width: 1.5" }));
    shapes.push(make("circle", { cx: x(i), cy: y(codes[i] * step), r: 3.2, style: "fill: var(--blue)" }));
  });
  const lines = gap >= 2 ? t("lines: levels") : t("too many levels to draw");
  shapes.push(label(left, height - 4, `${t("ring: weight, dot: after rounding")}, ${lines}`, { class: "soft" }));
  return shapes;
}

// All components end to end, and where the card ends.
function paintStack(width, rows, total, cardGib) {
  const scale = width / (Math.max(total, cardGib) * 1.04);
  let x = 0;
  const parts = rows.map(({ value, colour }) => {
    const part = rect(x, 26, value * scale - 1, 34, colour);
    x += value * scale;
    return part;
  });
  const end = cardGib * scale;
  const anchor = end > width / 2 ? "end" : "start";
  return [
    ...parts,
    line(end, 8, end, 66, "red", { "stroke-width": 2.5 }),
    label(end + (anchor === "end" ? -6 : 6), 18, t("the card ends at {n} GiB", { n: inform(cardGib, 1) }), { "text-anchor": anchor }),
  ];
}

// A token's text; its bytes where it holds only a part of a letter.
function textOf(piece) {
  const bytes = [...piece].map((letter) => LETTERS.indexOf(letter));
  const text = new TextDecoder().decode(new Uint8Array(bytes));
  const hexadecimal = bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
  return text.includes("\ufffd") ? `‹${hexadecimal}›` : text.replaceAll("\n", "⏎");
}

// What a slider stands at, beside its name and for those who hear it.
function show(field, text = inform(Number(field.value), 2)) {
  field.parentElement.querySelector(".value").textContent = text;
  field.setAttribute("aria-valuetext", text);
}

function update(section) {
  const form = section.querySelector("form");
  form.querySelectorAll("input[type=range]").forEach((field) => show(field));
  sections[section.id](section, form.elements);
}

// A card starts with its profile; a row of the data fills the fields.
function startCard({ card, batch, max_length: length, checkpointing }) {
  const profile = DATA.memory.cards[card.value];
  [batch.max, length.max] = [profile.batches.length - 1, profile.lengths.length - 1];
  [batch.value, length.value] = [profile.batch, profile.length];
  checkpointing.checked = profile.checkpointing;
}

function startRow({ example, instruction, input, output }) {
  const row = DATA.tokens.rows[example.value];
  [instruction.value, input.value, output.value] = [row.instruction, row.input, row.output];
}

for (const section of document.querySelectorAll("section")) {
  const form = section.querySelector("form");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", ({ target }) => {
    if (target.name === "card") startCard(form.elements);
    if (target.name === "example") startRow(form.elements);
    update(section);
  });
  if (section.id === "memory") startCard(form.elements);
  if (section.id === "tokens") startRow(form.elements);
  update(section);
}
addEventListener("resize", () => document.querySelectorAll("section").forEach(update));
