"use strict";
// The page's arithmetic, apart from the page: tests hold each function equal to the Python code it repeats.
// Each takes what play_data() made as its first argument.

// The nearest float16, as bitsandbytes casts weights before it quantizes them.
function toHalf(x) {
  if (x === 0) return 0;
  const exponent = Math.max(Math.floor(Math.log2(Math.abs(x))), -14);
  const spacing = 2 ** (exponent - 10);
  return roundToEven(Math.fround(x) / spacing) * spacing;
}

function roundToEven(x) {
  const low = Math.floor(x);
  const above = x - low;
  return above > 0.5 || (above === 0.5 && low % 2 !== 0) ? low + 1 : low;
}

// Notebook 03: a row whose largest magnitude is `absmax`, one weight of it `outlier` times as large.
function quantizeRow(data, bits, absmax, outlier) {
  const { row, outlier: place } = data.grid;
  const large = outlier > 1 ? { [place]: outlier } : {};
  const weights = row.map((weight, i) => toHalf((large[i] ?? weight) * absmax));
  const top = 2 ** (bits - 1) - 1;
  const largest = Math.max(...weights.map(Math.abs));
  const scale = Math.fround(Math.fround(1 / largest) * top); // torch divides a number by a tensor in this way
  const codes = weights.map((weight) => roundToEven(Math.fround(weight * scale)) + 0);
  const step = largest / top;
  const others = weights.map((_, i) => i).filter((i) => !(i in large));
  return { weights, codes, step, error: relativeError(weights, codes, step, others) };
}

// Norm of the rounding errors over the norm of the weights, of these places.
function relativeError(weights, codes, step, places) {
  const norm = (value) => Math.sqrt(places.reduce((sum, i) => sum + value(i) ** 2, 0));
  return norm((i) => codes[i] * step - weights[i]) / norm((i) => weights[i]);
}

// Notebook 04: r * (d_in + d_out) for each linear layer; four bytes a parameter in the adapter's file.
function planAdapter(data, r, targets) {
  const parts = targets.map((name) => [name, r * data.lora.per_rank[name]]);
  const parameters = parts.reduce((sum, [, size]) => sum + size, 0);
  const share = parameters / (data.lora.weights + parameters);
  return { parts, parameters, mib: (4 * parameters) / 2 ** 20, share };
}

// The letter that stands for each byte in the pieces of a byte-level tokenizer, such as Ġ for a space.
const LETTERS = Array.from({ length: 256 }, (_, byte) => byte);
LETTERS.reduce((next, byte) => {
  const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  LETTERS[byte] = String.fromCodePoint(printable ? byte : next);
  return printable ? next : next + 1;
}, 256);

const WORDS =
  /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

// A text's pieces: special tokens as they are, words by byte pair encoding.
function tokenize(data, text) {
  const { merges, special } = data.tokens;
  const ranks = new Map(merges.map((pair, rank) => [pair, rank]));
  const marks = special.map((token) => token.replace(/[|<>]/g, "\\$&")).join("|");
  return text.split(new RegExp(`(${marks})`)).flatMap((part, i) => {
    if (i % 2) return [part];
    return (part.match(WORDS) ?? []).flatMap((word) => mergePieces(word, ranks));
  });
}

// Of all neighbours the pair that was learned first becomes one piece, until none is left.
function mergePieces(word, ranks) {
  const pieces = Array.from(new TextEncoder().encode(word), (byte) => LETTERS[byte]);
  for (;;) {
    let [place, lowest] = [-1, Infinity];
    for (let i = 0; i + 1 < pieces.length; i++) {
      const rank = ranks.get(`${pieces[i]} ${pieces[i + 1]}`) ?? Infinity;
      if (rank < lowest) [place, lowest] = [i, rank];
    }
    if (place < 0) return pieces;
    pieces.splice(place, 2, pieces[place] + pieces[place + 1]);
  }
}

// Notebook 05: the row in Alpaca's template, cut at `limit` tokens as trl cuts it, and each token's role.
function maskRow(data, row, limit) {
  const { bos, eos } = data.tokens;
  const [instruction, input, output] = ["instruction", "input", "output"].map((name) => strip(row[name]));
  const template = input ? data.tokens.with_input : data.tokens.without_input;
  const asked = template.replace(/\{(instruction|input)\}/g, (_, name) => ({ instruction, input })[name]);
  const prompt = [bos, ...tokenize(data, asked)];
  const whole = [...prompt, ...tokenize(data, output), eos];
  const pieces = whole.slice(0, limit);
  const roles = pieces.map((piece, i) => {
    if (i < prompt.length) return "prompt";
    return i === pieces.length - 1 && piece === eos ? "eos" : "completion";
  });
  const scored = roles.filter((role) => role !== "prompt").length;
  return { pieces, roles, tokens: whole.length, prompt: prompt.length, scored, eos: roles.includes("eos") };
}

// What Python's strip() takes away.
function strip(text) {
  return text.replace(/^[\p{White_Space}\x1c-\x1f]+|[\p{White_Space}\x1c-\x1f]+$/gu, "");
}

// Notebooks 01 and 06: looked up, as Python has planned every setting of the controls.
function planMemory(data, card, checkpointing, batch, length) {
  const { batches, lengths, plans } = data.memory.cards[card];
  const place = ((checkpointing ? 1 : 0) * batches.length + batch) * lengths.length + length;
  return { ...plans[place], total: plans[place].gib.reduce((sum, size) => sum + size, 0) };
}

// Notebook 08: hours and price of training on this many tokens.
function planEpoch(data, rung, tokens, price) {
  const { speed } = data.speed.rungs.find((found) => found.rung === rung);
  const hours = tokens / speed / 3600;
  return { hours, price: hours * price };
}
