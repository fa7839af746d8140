"use strict";

// What stands in a record is only ever put into text, never into markup.
const data = JSON.parse(document.getElementById("data").textContent);
const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#9a8c00"];
const byKey = new Map(data.entries.map((entry) => [entry.key, entry]));
const at = (id) => document.getElementById(id);
const number = (value, digits) =>
  value === null ? "-" : value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (value) => number(value === null ? null : 100 * value, 2);
const spread = (mean, std) => percent(mean) + (std === null ? "" : ` ± ${percent(std)}`);
const flops = (value) => (value ? value.toExponential(2).replace("e+", "e") : "-");
const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const className = (label) => data.classes[label] ?? `class ${label}`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => element("option", { value }, text)));
}

// Several rows may be of one entry: on other machines, in another dtype, with other libraries.
const longName = (entry) => `${entry.entry}, ${entry.condition}`;

// The table.

const COLUMNS = [
  { title: "entry", value: (e) => e.entry, text: true },
  { title: "test accuracy, %", value: (e) => e.test_accuracy, shown: (e) => spread(e.test_accuracy, e.test_std) },
  { title: "rank", value: (e) => e.rank, shown: (e) => (e.rank === null ? "n = 1" : e.rank) },
  { title: "n", value: (e) => e.num_seeds },
  { title: "val. accuracy, %", value: (e) => e.val_accuracy, shown: (e) => percent(e.val_accuracy) },
  { title: "params", value: (e) => e.num_params, shown: (e) => number(e.num_params, 0) },
  { title: "epochs", value: (e) => e.num_epochs },
  { title: "train time, s", value: (e) => e.train_seconds, shown: (e) => number(e.train_seconds, 1) },
  { title: "core-seconds", value: (e) => e.core_seconds, shown: (e) => number(e.core_seconds, 1) + (e.busy ? " busy" : "") },
  { title: "training FLOPs", value: (e) => e.flops || null, shown: (e) => flops(e.flops) },
  { title: "dtype", value: (e) => e.dtype, text: true },
  { title: "condition", value: (e) => e.condition, text: true, wrap: true },
];
let sorting = { column: COLUMNS[1], descending: true };
const chosen = new Set(); // keys of the entries whose curves are drawn

function compared(a, b) {
  const [left, right] = [sorting.column.value(a), sorting.column.value(b)];
  if (left === null || right === null) return (left === null) - (right === null); // what is missing comes last
  const order = (left > right) - (left < right);
  return (sorting.descending ? -order : order) || (a.key > b.key) - (a.key < b.key);
}

function isShown(entry) {
  const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = `${longName(entry)} ${entry.model} ${entry.config_file}`.toLowerCase();
  return words.every((word) => text.includes(word)) &&
    ["condition", "dtype"].every((field) => !at(field).value || at(field).value === entry[field]);
}

function drawHead() {
  const row = element("tr", {}, element("th", { scope: "col" }, "curves"));
  for (const column of COLUMNS) {
    const button = element("button", { type: "button" }, column.title);
    button.addEventListener("click", () => {
      const descending = sorting.column === column ? !sorting.descending : !column.text && column.title !== "rank";
      sorting = { column, descending };
      drawRows();
    });
    column.head = element("th", { scope: "col", className: column.text ? "text" : "" }, button);
    row.append(column.head);
  }
  at("rows").tHead.replaceChildren(row);
}

function drawRows() {
  for (const column of COLUMNS) {
    const order = sorting.descending ? "descending" : "ascending";
    column.head.setAttribute("aria-sort", column === sorting.column ? order : "none");
  }
  const shown = data.entries.filter(isShown).sort(compared);
  at("rows").tBodies[0].replaceChildren(...shown.map(tableRow));
  at("count").textContent = `${shown.length} of ${data.entries.length} rows`;
}

function tableRow(entry) {
  const box = element("input", { type: "checkbox", checked: chosen.has(entry.key) });
  box.setAttribute("aria-label", `Draw the curves of ${longName(entry)}`);
  box.addEventListener("change", () => choose(entry.key, box.checked));
  const row = element("tr", {}, element("td", {}, box));
  for (const column of COLUMNS) {
    const shown = String(column.shown ? column.shown(entry) : column.value(entry));
    const classes = [column.text && "text", column.wrap && "wrap"].filter(Boolean).join(" ");
    row.append(element("td", { className: classes }, column === COLUMNS[0] ? entryButton(entry, shown) : shown));
  }
  return row;
}

function entryButton(entry, text) {
  const parts = text.split(/(?=[+=])/).flatMap((part) => [element("wbr"), part]); // where a long name may break
  const button = element("button", { type: "button", className: "plain" }, ...parts);
  button.addEventListener("click", () => {
    showEntry(entry.key);
    at("entry").scrollIntoView();
    at("which").focus({ preventScroll: true });
  });
  return button;
}

// Charts.

const charts = {};

function draw(id, label, config) {
  charts[id]?.destroy();
  at(id).setAttribute("aria-label", label);
  Chart.defaults.color = colourOf("--text");
  Chart.defaults.borderColor = colourOf("--line");
  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  const base = { animation: false, maintainAspectRatio: false, responsive: true };
  charts[id] = new Chart(at(id), { ...config, options: { ...base, ...config.options } });
}

function choose(key, wanted) {
  if (wanted) chosen.add(key);
  else chosen.delete(key);
  drawRows();
  drawCurves();
}

function drawCurves() {
  const [quantity, over] = [at("quantity").value, at("over").value];
  const scale = quantity === "accuracy" ? 100 : 1;
  const [datasets, items, unwatched] = [[], [], []];
  [...chosen].forEach((key, place) => {
    const entry = byKey.get(key);
    const colour = PALETTE[place % PALETTE.length];
    const remove = element("button", { type: "button", className: "small" }, "×");
    remove.setAttribute("aria-label", `Remove the curves of ${longName(entry)}`);
    remove.addEventListener("click", () => choose(key, false));
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = colour;
    const same = [...chosen].filter((other) => byKey.get(other).entry === entry.entry).length > 1;
    items.push(element("li", {}, swatch, entryButton(entry, same ? longName(entry) : entry.entry), remove));
    if (!entry.watched) unwatched.push(entry.entry);
    for (const run of data.runs.filter((run) => run.of === key)) {
      for (const [split, dashes] of [["held_out", []], ["train", [5, 4]]]) {
        const values = run.curves[`${split}_${quantity}`];
        if ((split === "train" && !at("with-train").checked) || values.every((value) => value === null)) continue;
        const points = values.map((value, epoch) => ({
          x: over === "epoch" ? epoch + 1 : run.curves.core_seconds[epoch],
          y: value === null ? null : scale * value,
        }));
        const radius = points.length < 3 ? 4 : 0; // a line of one point is no line
        datasets.push({
          label: `${entry.entry}, seed ${run.seed}, ${split === "train" ? "train" : entry.watched}`,
          data: points, borderColor: colour, backgroundColor: colour, borderDash: dashes, borderWidth: split === "train" ? 1 : 1.8,
          pointRadius: radius, pointHitRadius: 8, pointStyle: split === "train" ? "rectRot" : "circle",
        });
      }
    }
  });
  at("chosen").replaceChildren(...items);
  const notes = [chosen.size ? "A line for each seed. Solid: the split that the run watched, validation or test. Dashed: train, dropout and augmentation included." :
    "Nothing is chosen: tick rows of the table."];
  if (unwatched.length) notes.push(`Watched no split, so train alone: ${[...new Set(unwatched)].join(", ")}.`);
  at("curves-note").textContent = notes.join(" ");
  const xTitle = over === "epoch" ? "epoch" : "core-seconds of training";
  const yTitle = quantity === "accuracy" ? "accuracy, %" : "loss (cross-entropy)";
  draw("curves-chart", `${yTitle} over ${xTitle} of ${chosen.size} entries`, {
    type: "line",
    data: { datasets },
    options: {
      interaction: { mode: "nearest", intersect: false },
      scales: {
        x: { type: "linear", title: { display: true, text: xTitle }, ticks: { precision: 0 }, min: over === "epoch" ? 1 : 0 },
        y: { title: { display: true, text: yTitle } },
      },
      plugins: { legend: { display: false }, tooltip: { callbacks: { title: ([item]) => `${xTitle} ${number(item.parsed.x, over === "epoch" ? 0 : 1)}` } } },
    },
  });
}

// Costs.

// Machines are told apart for core-seconds; FLOPs are the same on each, so that an entry's row of most seeds stands for all.
function views() {
  const conditions = [...new Set(data.entries.map((entry) => entry.condition))];
  const versions = [...new Set(data.entries.map((entry) => entry.data_version))];
  return [
    ...versions.map((version) => ({
      name: `training FLOPs, all machines, data of ${version}`, title: "FLOPs of training", cost: (e) => e.flops,
      entries: mostSeeds(data.entries.filter((entry) => entry.data_version === version)),
    })),
    ...conditions.map((condition) => ({
      name: `core-seconds, ${condition}`, title: "core-seconds of training (median)", cost: (e) => e.core_seconds,
      entries: data.entries.filter((entry) => entry.condition === condition),
    })),
  ].map((view) => ({ ...view, entries: view.entries.filter((entry) => view.cost(entry) > 0) }));
}

function mostSeeds(entries) {
  const best = new Map();
  for (const entry of entries) {
    if (!best.has(entry.entry) || entry.num_seeds > best.get(entry.entry).num_seeds) best.set(entry.entry, entry);
  }
  return [...best.values()];
}

function frontOf({ entries, cost }) {
  const front = [];
  const competing = entries.filter((entry) => entry.competes);
  for (const entry of competing.sort((a, b) => cost(a) - cost(b) || b.test_accuracy - a.test_accuracy)) {
    if (!front.length || entry.test_accuracy > front.at(-1).test_accuracy) front.push(entry);
  }
  return front;
}

// Names beside the points, those of the front first, as far as they cover nothing.
const names = {
  id: "names",
  afterDatasetsDraw(chart) {
    const { ctx, chartArea } = chart;
    const taken = chart.data.datasets.flatMap((dataset, which) =>
      dataset.names ? chart.getDatasetMeta(which).data.map(({ x, y }) => [x - 5, y - 5, x + 5, y + 5]) : []);
    const corners = chart.getDatasetMeta(chart.data.datasets.findIndex((dataset) => dataset.stepped)).data;
    corners.slice(1).forEach(({ x, y }, index) => {
      const before = corners[index];
      taken.push([before.x, before.y - 2, x, before.y + 2], [x - 2, y, x + 2, before.y]);
    });
    ctx.save();
    ctx.font = `12px ${Chart.defaults.font.family}`;
    ctx.fillStyle = colourOf("--text");
    ctx.textBaseline = "middle";
    chart.data.datasets.forEach((dataset, which) => (dataset.names ?? []).forEach((name, index) => {
      const { x, y } = chart.getDatasetMeta(which).data[index];
      const width = ctx.measureText(name).width;
      const places = [
        [x + 9, y], [x - 9 - width, y], [x - width / 2, y - 14], [x - width / 2, y + 14],
        [x + 7, y + 11], [x - 7 - width, y - 11], [x + 7, y - 11], [x - 7 - width, y + 11],
      ];
      const free = places.find(([left, middle]) => {
        const box = [left, middle - 7, left + width, middle + 7];
        const inside = box[0] >= chartArea.left && box[2] <= chartArea.right && box[1] >= chartArea.top && box[3] <= chartArea.bottom;
        return inside && !taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]);
      });
      if (free) {
        taken.push([free[0], free[1] - 7, free[0] + width, free[1] + 7]);
        ctx.fillText(name, ...free);
      }
    }));
    ctx.restore();
  },
};

function drawCosts() {
  const view = views()[at("cost").selectedIndex];
  if (!view) return;
  const front = frontOf(view);
  const point = (entry) => ({ x: view.cost(entry), y: 100 * entry.test_accuracy, entry });
  const [blue, red] = [PALETTE[0], PALETTE[1]];
  const competing = view.entries.filter((entry) => entry.competes);
  // A mistake far below would squash the rest; only what competes decides where the picture begins.
  const least = Math.min(...(competing.length ? competing : view.entries).map((entry) => 100 * entry.test_accuracy));
  const below = view.entries.filter((entry) => 100 * entry.test_accuracy < least);
  // In the order of their cost, by which Chart.js knows where the axis begins and ends.
  const drawn = view.entries.filter((entry) => !below.includes(entry) && !front.includes(entry)).sort((a, b) => view.cost(a) - view.cost(b));
  const dots = (entries) => ({
    data: entries.map(point), names: entries.map((entry) => entry.entry), showLine: false, pointRadius: 5, pointHoverRadius: 7,
    borderColor: blue, pointBackgroundColor: entries.map((entry) => (entry.competes ? blue : colourOf("--page"))), pointBorderWidth: 2,
  });
  draw("costs-chart", `Test accuracy over ${view.name}; the front is listed below`, {
    type: "line",
    data: { datasets: [dots(front), dots(drawn), { data: front.map(point), stepped: true, borderColor: red, borderWidth: 2, pointRadius: 0, pointHitRadius: 0 }] },
    plugins: [names],
    options: {
      parsing: false,
      layout: { padding: { right: 12 } },
      interaction: { mode: "nearest", intersect: true },
      onClick: (_, hits) => hits.length && showEntry(hits[0].element.$context.raw.entry.key),
      scales: {
        x: { type: "logarithmic", grace: "10%", title: { display: true, text: view.title }, ticks: { autoSkip: false, callback: (value, _, ticks) => tickText(value, ticks) } },
        y: { grace: "8%", title: { display: true, text: "test accuracy, %" } },
      },
      plugins: {
        legend: { display: false },
        tooltip: { callbacks: { title: () => "", label: ({ raw }) => `${raw.entry.entry}: ${spread(raw.entry.test_accuracy, raw.entry.test_std)} % (${raw.entry.num_seeds}), ${costText(view, raw.entry)}` } },
      },
    },
  });
  at("costs-note").textContent = below.length ? `Below the picture: ${below.map((entry) => `${entry.entry} (${percent(entry.test_accuracy)} %)`).join(", ")}.` : "";
  at("front").replaceChildren(...front.map((entry) =>
    element("li", {}, entryButton(entry, entry.entry), `${percent(entry.test_accuracy)} % for ${costText(view, entry)}`)));
}

// On a logarithmic axis: powers of ten, and where it is short, their doubles and quintuples.
function tickText(value, ticks) {
  const digit = Number((value / 10 ** Math.floor(Math.log10(value) + 1e-9)).toPrecision(3));
  const isLong = ticks.at(-1).value > 100 * ticks[0].value;
  if (!(isLong ? [1] : [1, 2, 5]).includes(digit)) return null;
  return value >= 1e6 ? value.toExponential(0).replace("e+", "e") : number(value, value < 1 ? 2 : 0);
}

const costText = (view, entry) =>
  view.title.startsWith("FLOPs") ? `${flops(entry.flops)} FLOPs` : `${number(entry.core_seconds, 1)} core-seconds`;

// An entry, and pictures.

function picture(index, text) {
  const packed = atob(data.images[index]);
  const canvas = element("canvas", { width: 28, height: 28 });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Test image ${index}`);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(28, 28);
  for (let place = 0; place < 784; place++) {
    const byte = packed.charCodeAt(place >> 1);
    pixels.data.fill(17 * (place % 2 ? byte & 15 : byte >> 4), 4 * place, 4 * place + 3);
    pixels.data[4 * place + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return element("li", {}, canvas, text);
}

function showEntry(key) {
  const entry = byKey.get(key);
  if (!entry) return;
  at("which").value = key;
  const facts = {
    "test accuracy, %": `${spread(entry.test_accuracy, entry.test_std)} (n = ${entry.num_seeds})`, condition: entry.condition, config: entry.config_file, model: entry.model,
    parameters: number(entry.num_params, 0), epochs: entry.num_epochs, "training FLOPs": flops(entry.flops),
    "train time, s": number(entry.train_seconds, 1), "core-seconds": number(entry.core_seconds, 1), software: entry.software.join(", "),
    seeds: data.runs.filter((run) => run.of === key).map((run) => `${run.seed}: ${percent(run.test_accuracy)} %`).join(", "),
  };
  at("facts").replaceChildren(...Object.entries(facts).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
  at("confusion-note").textContent = `Rows are true classes, columns predicted ones; counts are of the test images${entry.num_seeds === 1 ? "" : `, over ${entry.num_seeds} runs`}.`;
  const head = element("tr", {}, element("td"), ...data.classes.map((name) => element("th", { scope: "col" }, name)));
  const body = entry.confusion.map((row, label) => {
    const total = Math.max(1, row.reduce((sum, count) => sum + count, 0));
    const cells = row.map((count, predicted) => {
      const cell = element("td", {}, count ? number(count, 0) : "·");
      // The diagonal would outshine the mistakes, which are what one looks for.
      const share = label === predicted ? 0.25 : Math.min(0.9, (4 * count) / total);
      if (count) cell.style.background = `rgba(${colourOf("--heat")}, ${share.toFixed(3)})`;
      return cell;
    });
    return element("tr", {}, element("th", { scope: "row" }, data.classes[label]), ...cells);
  });
  at("confusion").replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
  at("wrong-note").textContent = entry.wrong.length ? "In most of its runs wrong, and of equals the first in the test set." : "No pictures: the images of its data are not at hand.";
  at("wrong").replaceChildren(...entry.wrong.map(([index, label, predicted, times]) =>
    picture(index, `${index}: ${className(label)}, taken for ${className(predicted)}${entry.num_seeds > 1 ? ` (wrong in ${times} of ${entry.num_seeds})` : ""}`)));
}

function showNever() {
  const { runs, count, images } = data.never_right;
  const part = images.length < count ? ` The first ${images.length} are shown.` : "";
  at("never-note").textContent = runs ? `${count} of ${number(data.num_test, 0)} test images are wrong in each of the ${runs} runs on today's data.${part}` : "No runs on today's data.";
  at("never-pictures").replaceChildren(...images.map(([index, label, predicted, times]) =>
    picture(index, `${index}: ${className(label)}, taken for ${className(predicted)} by ${times} of ${runs}`)));
}

// Begin.

const unique = (field) => [...new Set(data.entries.map((entry) => entry[field]))].map((value) => [value, value]);
options(at("condition"), [["", "all"], ...unique("condition")]);
options(at("dtype"), [["", "all"], ...unique("dtype")]);
options(at("cost"), views().map((view, place) => [place, view.name]));
options(at("which"), data.entries.map((entry) => [entry.key, longName(entry)]));
at("summary").textContent = `${data.entries.length} rows of ${data.runs.length} runs, under ${unique("condition").length} conditions.`;
for (const id of ["search", "condition", "dtype"]) at(id).addEventListener("input", drawRows);
for (const id of ["quantity", "over", "with-train"]) at(id).addEventListener("input", drawCurves);
for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
document.forms[0].addEventListener("reset", () => setTimeout(drawRows));
at("choose-none").addEventListener("click", () => { chosen.clear(); drawRows(); drawCurves(); });
at("cost").addEventListener("input", drawCosts);
at("which").addEventListener("input", () => showEntry(at("which").value));
drawHead();
const best = [...data.entries].sort(compared);
const watching = best.filter((entry) => entry.watched && entry.num_epochs > 2);
(watching.length ? watching : best).slice(0, 3).forEach((entry) => chosen.add(entry.key));
const drawAll = () => { drawRows(); drawCurves(); drawCosts(); };
drawAll();
showEntry(best[0]?.key);
showNever();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawAll(); showEntry(at("which").value); });
