
"use strict";
// Everything that is shown comes from the JSON beside this script, which explore/page.py describes.
// Text of others goes into the page as text alone (`textContent`), never as HTML.

const page = JSON.parse(document.getElementById("data").textContent);
const NONE = 65535; // of a cell, no slot or no token that it was merged into
const MODES = {kept: "kept tokens", merged: "what is merged into what", slots: "slots"};
const state = {image: 0, prompt: 0, budget: page.budgets.length - 1, mode: "kept", against: null,
  chosen: new Set(page.pruners.slice(0, 3).map((_, number) => number)), stages: new Map(), cell: null};
const panels = new Map();
const pictures = page.images.map(() => null);
const decoded = new WeakMap();

const find = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// ------------------------------------------------------------------------------ what is known

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

/** Numbers of 16 bits, the low byte first. */
function words(text) {
  const raw = bytes(text);
  return Array.from({length: raw.length / 2}, (_, i) => raw[2 * i] + 256 * raw[2 * i + 1]);
}

/** Of every cell of a stage: whether it is kept, its slot, and the cell that it was merged into. */
function cellsOf(stage) {
  if (!decoded.has(stage)) {
    const raw = bytes(stage.kept);
    const total = stage.grids.reduce((sum, [rows, columns]) => sum + rows * columns, 0);
    decoded.set(stage, {
      total,
      kept: Array.from({length: total}, (_, i) => ((raw[i >> 3] >> (7 - (i & 7))) & 1) === 1),
      slots: stage.slots && words(stage.slots),
      merged: stage.merged && words(stage.merged),
    });
  }
  return decoded.get(stage);
}

/** The number of a pruner's condition at the budget that is chosen; one without budgets has one. */
function conditionOf(pruner, budget = state.budget) {
  const own = (one) => one.pruner === pruner && (one.budget === null || one.budget === budget);
  return page.conditions.findIndex(own);
}

const runsNow = () => page.images[state.image].runs[page.prompts.length ? state.prompt : 0];

/** What a pruner made of the image and prompt that are chosen; null where it is left out. */
function runOf(pruner) {
  const condition = conditionOf(pruner);
  return condition < 0 ? null : runsNow()[condition];
}

const stagesOf = (run) => page.images[state.image].looks[run.look];

function stageOf(pruner) {
  const run = runOf(pruner);
  if (run === null) return null;
  const stages = stagesOf(run);
  return stages[Math.min(state.stages.get(pruner) ?? stages.length - 1, stages.length - 1)];
}

const countOf = (stage) => cellsOf(stage).kept.filter(Boolean).length;

function middle(values) {
  const sorted = values.filter((value) => value !== null && value !== undefined).sort((a, b) => a - b);
  if (!sorted.length) return null;
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}

const milliseconds = (value) => `${value >= 100 ? value.toFixed(0) : value.toPrecision(value >= 1 ? 3 : 2)}\u00a0ms`;

/** Of all images and prompts: the median time, and how often the answer is the unpruned model's. */
function summaryOf(condition) {
  const times = [];
  let same = 0, asked = 0;
  for (const image of page.images) {
    for (const runs of image.runs) {
      times.push(runs[condition].times[page.time]);
      asked += 1;
      same += runs[condition].answer === runs[0].answer;
    }
  }
  return {time: middle(times), same, asked};
}
const summaries = page.conditions.map((_, number) => summaryOf(number));

// ------------------------------------------------------------------------------ pictures

/** Calls `draw` for every border between a cell and the next one that belongs to another region. */
function borders({rows, columns}, regionOf, draw) {
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const here = regionOf(row * columns + column);
      if (column + 1 < columns && regionOf(row * columns + column + 1) !== here) draw(row, column + 1, 1, 0);
      if (row + 1 < rows && regionOf((row + 1) * columns + column) !== here) draw(row + 1, column, 0, 1);
    }
  }
}

class Picture {
  constructor(canvas, panel, view) {
    this.canvas = canvas;
    this.panel = panel;
    this.view = view; // {first, rows, columns} of one grid of a stage
  }

  draw() {
    const {canvas, view} = this, image = page.images[state.image];
    const width = Math.max(1, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
    const height = Math.max(1, Math.round(width * image.height / image.width));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
    const stage = stageOf(this.panel.pruner);
    if (stage === null || pictures[state.image] === null) return;
    this.pen = canvas.getContext("2d");
    this.edgesX = Array.from({length: view.columns + 1}, (_, i) => Math.round(i * width / view.columns));
    this.edgesY = Array.from({length: view.rows + 1}, (_, i) => Math.round(i * height / view.rows));
    this.line = Math.max(1, Math.round(Math.min(width / view.columns, height / view.rows) / 14));
    this.pen.drawImage(pictures[state.image], 0, 0, width, height);
    const cells = cellsOf(stage), mode = this.panel.mode(stage);
    if (mode === "kept") this.drawKept(cells);
    else this.drawRegions(cells, cells[mode], mode);
    this.drawCursor();
  }

  /** The rectangle of a cell of this grid. */
  box(cell) {
    const row = Math.floor(cell / this.view.columns), column = cell % this.view.columns;
    const x = this.edgesX[column], y = this.edgesY[row];
    return [x, y, this.edgesX[column + 1] - x, this.edgesY[row + 1] - y];
  }

  count() { return this.view.rows * this.view.columns; }

  /** What is dropped grey and dark, what is kept as it is, an outline between them. */
  drawKept({kept}) {
    const {pen, canvas, view} = this;
    const isKept = (cell) => kept[view.first + cell];
    const whole = new Path2D();
    for (let cell = 0; cell < this.count(); cell++) if (isKept(cell)) whole.rect(...this.box(cell));
    this.dim(0.62);
    pen.save();
    pen.clip(whole);
    pen.drawImage(pictures[state.image], 0, 0, canvas.width, canvas.height);
    pen.restore();
    this.strokeBorders(isKept, "#ffc400");
    const other = this.panel.other();
    if (other !== null && other.length === kept.length) this.drawDifference(isKept, (cell) => other[view.first + cell]);
  }

  /** Regions in colours, white between them; a dot on the token that others were merged into. */
  drawRegions({kept}, regions, mode) {
    const {pen, view} = this;
    const regionOf = (cell) => regions[view.first + cell];
    const at = this.cursor(), chosen = at === null ? null : regionOf(at);
    const order = mode === "slots" ? null : new Map(kept.flatMap((is, cell) => is ? [cell] : []).map((cell, i) => [cell, i]));
    for (let cell = 0; cell < this.count(); cell++) {
      const region = regionOf(cell), fades = chosen !== null && region !== chosen;
      pen.fillStyle = "rgba(10, 12, 16, 0.72)";
      if (region !== NONE) {
        const number = order === null ? region : order.get(region) ?? region;
        pen.globalAlpha = fades ? 0.25 : 0.6;
        pen.fillStyle = page.palette[number % page.palette.length];
      }
      pen.fillRect(...this.box(cell));
      pen.globalAlpha = 1;
    }
    this.strokeBorders(regionOf, "#ffffff");
    if (mode !== "merged") return;
    for (let cell = 0; cell < this.count(); cell++) {
      if (!kept[view.first + cell]) continue;
      const [x, y, w, h] = this.box(cell);
      pen.beginPath();
      pen.arc(x + w / 2, y + h / 2, Math.max(1.5, Math.min(w, h) / 7), 0, 2 * Math.PI);
      this.inked("#ffffff");
    }
  }

  /** Triangles on what is kept here alone, crosses on what the other one alone keeps. */
  drawDifference(isKept, isKeptThere) {
    const {pen} = this;
    for (let cell = 0; cell < this.count(); cell++) {
      if (isKept(cell) === isKeptThere(cell)) continue;
      const [x, y, w, h] = this.box(cell), r = Math.min(w, h) / 4, cx = x + w / 2, cy = y + h / 2;
      pen.beginPath();
      if (isKept(cell)) {
        pen.moveTo(cx, cy - r); pen.lineTo(cx + r, cy + r); pen.lineTo(cx - r, cy + r); pen.closePath();
        this.inked("#ffc400");
      } else {
        pen.moveTo(cx - r, cy - r); pen.lineTo(cx + r, cy + r);
        pen.moveTo(cx + r, cy - r); pen.lineTo(cx - r, cy + r);
        pen.lineWidth = this.line + 2; pen.strokeStyle = "#000000"; pen.stroke();
        pen.lineWidth = this.line; pen.strokeStyle = "#9fd8ff"; pen.stroke();
      }
    }
  }

  drawCursor() {
    const at = this.cursor();
    if (at === null) return;
    const [x, y, w, h] = this.box(at);
    this.pen.lineWidth = this.line + 3; this.pen.strokeStyle = "#000000"; this.pen.strokeRect(x, y, w, h);
    this.pen.lineWidth = this.line + 1; this.pen.strokeStyle = "#ffffff"; this.pen.strokeRect(x, y, w, h);
  }

  dim(strength) {
    const {pen, canvas} = this;
    pen.save();
    pen.globalCompositeOperation = "saturation";
    pen.globalAlpha = 0.8;
    pen.fillStyle = "#808080";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.restore();
    pen.fillStyle = `rgba(10, 12, 16, ${strength})`;
    pen.fillRect(0, 0, canvas.width, canvas.height);
  }

  inked(colour) {
    this.pen.fillStyle = colour; this.pen.fill();
    this.pen.lineWidth = 1; this.pen.strokeStyle = "#000000"; this.pen.stroke();
  }

  strokeBorders(regionOf, colour) {
    const {pen} = this, path = new Path2D();
    borders(this.view, regionOf, (row, column, down, right) => {
      path.moveTo(this.edgesX[column], this.edgesY[row]);
      path.lineTo(this.edgesX[column + right], this.edgesY[row + down]);
    });
    pen.lineCap = "square";
    pen.lineWidth = this.line + 2; pen.strokeStyle = "rgba(0, 0, 0, 0.6)"; pen.stroke(path);
    pen.lineWidth = this.line; pen.strokeStyle = colour; pen.stroke(path);
  }

  /** The cell under the cursor, which is shared by all pictures of the same grid; null if none. */
  cursor() {
    const cell = state.cell, {rows, columns} = this.view;
    return cell !== null && cell.rows === rows && cell.columns === columns ? cell.row * columns + cell.column : null;
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect(), {rows, columns} = this.view;
    const column = Math.floor((event.clientX - box.left) / box.width * columns);
    const row = Math.floor((event.clientY - box.top) / box.height * rows);
    if (row >= 0 && column >= 0 && row < rows && column < columns) setCell({rows, columns, row, column});
  }

  press(event) {
    const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
    if (event.key === "Escape") return setCell(null);
    if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const {rows, columns} = this.view, [down, right] = steps[event.key], at = this.cursor();
    let row = 0, column = 0;
    if (at !== null) {
      row = Math.min(rows - 1, Math.max(0, Math.floor(at / columns) + down));
      column = Math.min(columns - 1, Math.max(0, at % columns + right));
    }
    setCell({rows, columns, row, column});
  }

  /** Words for the cell under the cursor. */
  told(stage) {
    const at = this.cursor();
    if (at === null) return "";
    const {kept, slots, merged} = cellsOf(stage), cell = this.view.first + at;
    const name = (number) => {
      const local = number - this.view.first;
      const inside = local >= 0 && local < this.count();
      return inside ? `row ${Math.floor(local / this.view.columns) + 1}, column ${local % this.view.columns + 1}` : "a token of the other grid";
    };
    const parts = [kept[cell] ? "kept" : "dropped"];
    if (merged && merged[cell] !== NONE) {
      const others = merged.filter((target) => target === merged[cell]).length - 1;
      const more = others === 1 ? "1 other" : `${others} others`;
      if (merged[cell] === cell) parts[0] = others ? `kept, with ${more} merged into it` : "kept alone";
      else parts[0] = `merged into ${name(merged[cell])}`;
    }
    if (slots && slots[cell] !== NONE) {
      const size = slots.filter((slot) => slot === slots[cell]).length;
      parts.push(`slot ${slots[cell] + 1}, of ${size} tokens`);
    }
    return `${name(cell)}: ${parts.join("; ")}`;
  }
}
