
// ------------------------------------------------------------------------------ panels

class Panel {
  constructor(pruner) {
    this.pruner = pruner;
    this.pictures = [];
    this.shape = "";
    const id = `pruner-${pruner}`;
    this.counts = element("p", {class: "counts"});
    this.stages = element("select", {"aria-label": `Stage of ${page.pruners[pruner].label}`, onchange: () => {
      state.stages.set(this.pruner, Number(this.stages.value));
      update();
    }});
    this.stageLine = element("div", {class: "stage"}, this.stages);
    this.views = element("div");
    this.key = element("p", {class: "key"});
    this.cell = element("p", {id: `cell-${pruner}`, class: "cell", "aria-live": "polite"});
    this.answer = element("blockquote", {class: "answer"});
    this.verdict = element("p", {class: "verdict"});
    this.time = element("p", {class: "time"});
    this.note = element("p", {class: "note"}, page.pruners[pruner].note);
    this.root = element("article", {class: "panel", "aria-labelledby": id},
      element("h2", {id}, page.pruners[pruner].label), this.counts, this.stageLine, this.views,
      this.key, this.cell, this.answer, this.verdict, this.time, this.note);
    this.note.hidden = !page.pruners[pruner].note;
  }

  /** How a stage is drawn: as chosen, where it has that. */
  mode(stage) { return state.mode !== "kept" && stage[state.mode] ? state.mode : "kept"; }

  /** What the pruner that is compared with keeps; null for none. */
  other() {
    if (state.against === null || state.against === this.pruner) return null;
    const stage = stageOf(state.against);
    return stage === null ? null : cellsOf(stage).kept;
  }

  update() {
    const run = runOf(this.pruner), stage = stageOf(this.pruner);
    for (const part of [this.stageLine, this.views, this.key, this.answer, this.verdict, this.time]) part.hidden = run === null;
    if (run === null) {
      this.counts.textContent = "left out at this budget";
      this.cell.textContent = "";
      return;
    }
    this.updateStages(stagesOf(run), stage);
    const {total} = cellsOf(stage), count = countOf(stage);
    this.counts.textContent = `${count} of ${total} tokens kept${stage.place}`;
    this.updateViews(stage);
    this.updateKey(stage);
    const isUnpruned = this.pruner === 0;
    this.answer.hidden = run.answer === null;
    this.answer.textContent = run.answer || "(an empty answer)";
    this.verdict.hidden = run.answer === null || isUnpruned;
    this.verdict.textContent = run.answer === runsNow()[0].answer ? "= the unpruned model's answer" : "\u2260 the unpruned model's answer";
    this.time.textContent = timeOf(run.times);
    this.time.hidden = !this.time.textContent;
  }

  updateStages(stages, stage) {
    this.stageLine.hidden = stages.length < 2;
    const names = stages.map((one) => one.place.replace(/^, /, "from ") || "before the language model");
    if (this.stages.dataset.names !== names.join("\n")) {
      this.stages.dataset.names = names.join("\n");
      this.stages.replaceChildren(...names.map((name, i) => element("option", {value: i}, name)));
    }
    this.stages.value = stages.indexOf(stage);
  }

  /** A canvas for each grid; those that fit stay, and the focus with them. */
  updateViews(stage) {
    const shape = JSON.stringify(stage.grids);
    if (shape !== this.shape) {
      this.shape = shape;
      let first = 0;
      this.pictures = stage.grids.map(([rows, columns]) => {
        const canvas = element("canvas", {role: "application", "aria-roledescription": "picture", "aria-describedby": `cell-${this.pruner}`, tabindex: 0, width: 1, height: 1});
        const picture = new Picture(canvas, this, {first, rows, columns});
        first += rows * columns;
        canvas.addEventListener("pointermove", (event) => picture.point(event));
        canvas.addEventListener("pointerdown", (event) => picture.point(event));
        canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") setCell(null); });
        canvas.addEventListener("keydown", (event) => picture.press(event));
        return picture;
      });
      const parts = this.pictures.map(({canvas, view: {rows, columns}}) => element("figure", {}, canvas,
        element("figcaption", {hidden: this.pictures.length < 2}, `${rows} x ${columns} tokens`)));
      this.views.replaceChildren(...parts);
    }
    const image = page.images[state.image], label = page.pruners[this.pruner].label;
    for (const picture of this.pictures) {
      const {first, rows, columns} = picture.view;
      const here = cellsOf(stage).kept.slice(first, first + rows * columns).filter(Boolean).length;
      const words = `${image.name} under ${label}: ${here} of ${rows} x ${columns} tokens kept`;
      picture.canvas.setAttribute("aria-label", words);
      picture.draw();
    }
    const told = this.pictures.map((picture) => picture.told(stage)).filter(Boolean);
    this.cell.textContent = told.join("; ");
  }

  updateKey(stage) {
    const mode = this.mode(stage), other = this.other(), {kept} = cellsOf(stage);
    let words = "";
    if (mode === "slots") words = `each token in the colour of its strongest of ${stage.numSlots} slots`;
    if (mode === "merged") words = "regions are merged into the token with the dot; dark is dropped";
    if (mode === "kept" && state.mode !== "kept") words = `no ${state.mode === "slots" ? "slots" : "merging"} to draw`;
    if (mode === "kept" && other !== null && other.length === kept.length) {
      const both = kept.filter((is, i) => is && other[i]).length, own = kept.filter(Boolean).length;
      const theirs = other.filter(Boolean).length, name = page.pruners[state.against].label;
      words = `\u25b2 only here: ${own - both}; \u2715 only in ${name}: ${theirs - both}; in both: ${both}`;
    }
    this.key.textContent = words;
    this.key.hidden = !words;
  }
}

function timeOf(times) {
  const names = {tower: "tower", choosing: "choosing", projector: "projector", model: "language model", other: "the rest"};
  const parts = Object.entries(names).filter(([name]) => times[name] !== undefined).map(([name, word]) => `${word} ${milliseconds(times[name])}`);
  if (times.first === undefined) return parts.join(", ");
  return `first token after ${milliseconds(times.first)}: ${parts.join(", ")}`;
}

// ------------------------------------------------------------------------------ the page

function updateTable() {
  const answers = page.prompts.length > 0, runs = runsNow();
  const timed = summaries.some((one) => one.time !== null);
  const heads = [["Pruner"], ["Budget", "number"], ["Tokens kept", "number"]];
  if (timed) heads.push([page.time === "first" ? "First token, median" : "Choosing, median", "number"]);
  if (answers) heads.push(["Same as unpruned", "number"], ["Answer"]);
  const rows = page.conditions.map((condition, number) => {
    const run = runs[number], stages = stagesOf(run), {time, same, asked} = summaries[number];
    const isShown = state.chosen.has(condition.pruner) && conditionOf(condition.pruner) === number;
    const cells = [
      element("td", {class: "number"}, condition.budget === null ? "\u2013" : page.budgets[condition.budget]),
      element("td", {class: "number"}, `${countOf(stages[stages.length - 1])}`)];
    if (timed) cells.push(element("td", {class: "number"}, time === null ? "\u2013" : milliseconds(time)));
    if (answers) cells.push(element("td", {class: "number"}, number ? `${same} of ${asked}` : "\u2013"), element("td", {class: "text"}, run.answer));
    return element("tr", {"aria-current": isShown && "true"}, element("th", {scope: "row"}, page.pruners[condition.pruner].label), ...cells);
  });
  const head = element("tr", {}, ...heads.map(([name, kind]) => element("th", {scope: "col", class: kind ?? null}, name)));
  find("figures").replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
}

/** Show the state as it is now. */
function update() {
  const image = page.images[state.image];
  find("image-name").textContent = `${state.image + 1} of ${page.images.length}: ${image.name}`;
  find("previous").disabled = state.image === 0;
  find("next").disabled = state.image === page.images.length - 1;
  [...find("strip").children].forEach((button, number) => {
    if (number === state.image) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
  if (page.budgets.length) {
    find("budget").value = state.budget;
    find("budget").setAttribute("aria-valuetext", `${page.budgets[state.budget]} tokens`);
    find("budget-name").textContent = page.budgets[state.budget];
  }
  find("prompt").value = state.prompt;
  find("asked").textContent = page.prompts.length ? `Asked: ${page.prompts[state.prompt]}` : "";
  find("mode").value = state.mode;
  find("against").value = state.against ?? "";
  const shown = page.pruners.map((_, number) => number).filter((number) => state.chosen.has(number));
  const wanted = shown.map((number) => {
    if (!panels.has(number)) panels.set(number, new Panel(number));
    return panels.get(number).root;
  });
  const there = [...find("panels").children];
  if (wanted.length !== there.length || wanted.some((root, i) => root !== there[i])) find("panels").replaceChildren(...wanted);
  if (!wanted.length) find("panels").replaceChildren(element("p", {class: "empty"}, "Choose a pruner above."));
  for (const number of shown) panels.get(number).update();
  updateTable();
}

/** Only what depends on the cursor. */
function setCell(cell) {
  if (JSON.stringify(cell) === JSON.stringify(state.cell)) return;
  state.cell = cell;
  for (const number of state.chosen) if (runOf(number) !== null) panels.get(number)?.updateViews(stageOf(number));
}

function setImage(number) {
  if (number < 0 || number >= page.images.length) return;
  state.image = number;
  if (pictures[number] === null) {
    const picture = new Image();
    picture.onload = () => { pictures[number] = picture; update(); };
    picture.src = page.images[number].picture;
  }
  update();
  const strip = find("strip"), button = strip.children[number]; // the strip alone is scrolled, not the page
  strip.scrollLeft = button.offsetLeft - strip.offsetLeft - (strip.clientWidth - button.offsetWidth) / 2;
}

function setBudget(number) {
  if (number < 0 || number >= page.budgets.length) return;
  state.budget = number;
  update();
}

function pressed(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.target.closest("select, input[type=range], .scroll, .answer")) return; // they have their own use for arrows
  const does = {
    ArrowLeft: () => setImage(state.image - 1), ArrowRight: () => setImage(state.image + 1),
    ArrowUp: () => setBudget(state.budget + 1), ArrowDown: () => setBudget(state.budget - 1),
  }[event.key];
  if (does === undefined) return;
  event.preventDefault();
  does();
}

function build() {
  const where = page.kind === "tower" ? "the vision tower" : "the model";
  const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  find("about").textContent = `${count(page.images.length, "image")} as ${where} ${page.model} sees them, on ${page.device}. Bright patches are the visual tokens that a pruner keeps.`;
  find("command").textContent = page.command;
  find("timed").textContent = page.timed;
  find("strip").replaceChildren(...page.images.map((image, number) => element("button", {type: "button", "aria-label": image.name, onclick: () => setImage(number)},
    element("img", {src: image.picture, alt: "", loading: "lazy", width: image.width, height: image.height}))));
  find("strip").hidden = page.images.length < 2;
  find("previous").addEventListener("click", () => setImage(state.image - 1));
  find("next").addEventListener("click", () => setImage(state.image + 1));
  find("budget").max = Math.max(0, page.budgets.length - 1);
  find("budget").addEventListener("input", (event) => setBudget(Number(event.target.value)));
  find("budget-control").hidden = page.budgets.length === 0;
  find("budget-ends").replaceChildren(...page.budgets.map((name) => element("span", {}, name)));
  find("prompt").replaceChildren(...page.prompts.map((text, number) => element("option", {value: number}, text)));
  find("prompt").addEventListener("change", (event) => { state.prompt = Number(event.target.value); update(); });
  find("prompt-control").hidden = page.prompts.length === 0;
  const has = (mode) => page.images.some((image) => image.looks.some((stages) => stages.some((stage) => stage[mode])));
  const modes = Object.keys(MODES).filter((mode) => mode === "kept" || has(mode));
  find("mode").replaceChildren(...modes.map((mode) => element("option", {value: mode}, MODES[mode])));
  find("mode").addEventListener("change", (event) => { state.mode = event.target.value; update(); });
  find("mode-control").hidden = modes.length < 2;
  const names = page.pruners.map(({label}, number) => element("option", {value: number}, label));
  find("against").replaceChildren(element("option", {value: ""}, "nothing"), ...names.slice(1));
  find("against").addEventListener("change", (event) => { state.against = event.target.value === "" ? null : Number(event.target.value); update(); });
  find("against-control").hidden = page.pruners.length < 3;
  find("pruners").append(...page.pruners.map(({label}, number) => element("label", {class: "chip"},
    element("input", {type: "checkbox", checked: state.chosen.has(number), onchange: (event) => {
      if (event.target.checked) state.chosen.add(number);
      else state.chosen.delete(number);
      update();
    }}), label)));
  find("unfit").hidden = page.unfit.length === 0;
  find("unfit").querySelector("ul").replaceChildren(...page.unfit.map(({name, why}) => element("li", {}, `${name}: ${why}`)));
  find("main").hidden = false;
  document.addEventListener("keydown", pressed);
  new ResizeObserver(() => { for (const number of state.chosen) panels.get(number)?.pictures.forEach((picture) => picture.draw()); }).observe(find("panels"));
  setImage(0);
}

build();
