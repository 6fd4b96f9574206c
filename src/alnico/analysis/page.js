"use strict";
(() => {
  const NARROW = 600;
  const GLYPHS = { circle: "●", square: "■", diamond: "◆", cross: "✚", "triangle-up": "▲", "triangle-down": "▼", star: "★", x: "✖" };
  const make = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const plain = (text) => make("textarea", { innerHTML: text }).value;

  // Every axis and text of a figure in the colours of the page; a figure says only what is its own.
  const laidOut = (figure, width) => {
    const narrow = width < NARROW;
    const axis = {
      gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line"),
      automargin: true, fixedrange: true, ticks: "",
    };
    const layout = structuredClone(figure.layout);
    if (narrow) {
      for (const [key, patch] of Object.entries(figure.narrow || {})) Object.assign((layout[key] ??= {}), patch);
    }
    for (const key of ["xaxis", "yaxis"]) {
      layout[key] = { ...axis, ...layout[key] };
      if (layout[key].title) layout[key].title.font = { size: narrow ? 11 : 13, color: colour("--quiet") };
    }
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: colour("--ink") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left", namelength: -1 },
      margin: { l: 8, r: 12, t: 8, b: 36 },
      ...layout,
    };
  };

  const tableOf = (figure) => {
    if (figure.table) return figure.table;
    const [first] = figure.data;
    const ticks = (axis) => new Map((axis?.tickvals ?? []).map((value, i) => [value, axis.ticktext?.[i]]));
    const across = first?.orientation === "h";
    const [at, value] = across ? ["y", "x"] : ["x", "y"];
    const names = ticks(figure.layout[at + "axis"]);
    return {
      columns: ["", ...figure.data.map((trace) => plain(trace.name))],
      rows: (first?.[at] ?? []).map((place, i) => [names.get(place) ?? place, ...figure.data.map((trace) => trace[value][i])]),
    };
  };
  const shown = (value) => value === null || value === undefined ? "–" : typeof value === "number" ? String(+value.toPrecision(4)) : value;
  const fillTable = (place, figure) => {
    const { columns, rows } = tableOf(figure);
    const cell = (value, i) => i === 0
      ? make("th", { scope: "row", textContent: shown(value) })
      : make("td", { className: "n", textContent: shown(value) });
    place.replaceChildren(make("table", { className: "list" },
      make("thead", {}, make("tr", {}, ...columns.map((name) => make("th", { scope: "col", className: "n", textContent: name })))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map(cell))))));
  };

  const plots = [...document.querySelectorAll(".plot")].map((place) => {
    const { choices, views } = JSON.parse(document.getElementById(place.dataset.figure).textContent);
    const figureOf = place.closest("figure");
    const legend = figureOf.querySelector(".legend");
    const numbers = figureOf.querySelector("details");
    const selects = choices.map(({ options }) => {
      const select = make("select", {}, ...options.map((name, i) => make("option", { value: i, textContent: name })));
      select.addEventListener("change", () => draw());
      return select;
    });
    if (choices.length) {
      place.before(make("div", { className: "choices" }, ...choices.map(({ label }, i) => make("label", {}, label, selects[i]))));
    }
    const view = () => views[selects.map((s) => s.value).join("|")];
    const fillNumbers = () => { if (numbers.open) fillTable(numbers.querySelector(".scroll"), view()); };
    const fillLegend = (figure) => {
      const entries = new Map();
      figure.data.forEach((trace, i) => {
        if (!trace.name) return;
        const key = trace.legendgroup ?? trace.name;
        if (!entries.has(key)) entries.set(key, { trace, indices: [] });
        entries.get(key).indices.push(i);
      });
      legend.replaceChildren(...(entries.size < 2 ? [] : [...entries.values()].map(({ trace, indices }) => {
        const mark = make("span", { textContent: (GLYPHS[trace.marker?.symbol] ?? "■") + " " });
        mark.setAttribute("aria-hidden", "true");
        mark.style.color = trace.marker.color;
        const button = make("button", { type: "button" }, mark, plain(trace.name));
        button.setAttribute("aria-pressed", "true");
        button.addEventListener("click", () => {
          const now = button.getAttribute("aria-pressed") !== "true";
          button.setAttribute("aria-pressed", String(now));
          Plotly.restyle(place, { visible: now }, indices);
        });
        return make("li", {}, button);
      })));
    };
    const draw = () => {
      const figure = view();
      place.style.height = figure.layout.height + "px";
      fillLegend(figure);
      fillNumbers();
      return Plotly.react(place, structuredClone(figure.data), laidOut(figure, document.documentElement.clientWidth), { displayModeBar: false, responsive: true });
    };
    numbers.addEventListener("toggle", fillNumbers);
    return draw;
  });
  const drawAll = () => Promise.all(plots.map((draw) => draw()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia(`(max-width: ${NARROW - 1}px)`).addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", drawAll);

  for (const select of document.querySelectorAll("select[data-shows]")) {
    const parts = document.querySelectorAll(`#${select.dataset.shows} > *`);
    const show = () => parts.forEach((part, i) => { part.hidden = i !== select.selectedIndex; });
    select.addEventListener("change", show);
    show();
  }
  for (const select of document.querySelectorAll("select[data-filters]")) {
    const rows = document.querySelectorAll(`#${select.dataset.filters} tbody tr`);
    const filter = () => rows.forEach((row) => { row.hidden = select.value !== "" && row.dataset.model !== select.value; });
    select.addEventListener("change", filter);
    filter();
  }
  for (const heading of document.querySelectorAll("th[data-sorts]")) {
    const button = make("button", { type: "button", textContent: heading.textContent });
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const falling = heading.getAttribute("aria-sort") !== "descending";
      for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const key = (row) => row.cells[heading.cellIndex].dataset.value ?? row.cells[heading.cellIndex].textContent;
      const numeric = heading.dataset.sorts === "number";
      const compare = (a, b) => numeric ? Number(key(a)) - Number(key(b)) : key(b).localeCompare(key(a), undefined, { numeric: true });
      const body = heading.closest("table").tBodies[0];
      body.append(...[...body.rows].sort((a, b) => (falling ? compare(b, a) : compare(a, b))));
    });
  }
  drawAll().then(() => { document.documentElement.dataset.drawn = "yes"; });
})();
