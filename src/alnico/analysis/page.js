"use strict";
(() => {
  const NARROW = 600;
  const GLYPHS = { circle: "●", square: "■", diamond: "◆", cross: "✚", "triangle-up": "▲", "triangle-down": "▼", star: "★", x: "✖", "line-ew": "╌", "line-ew-open": "┈", "line-ns": "┃",
    "circle-open": "○", "square-open": "□", "diamond-open": "◇", "cross-open": "✢", "triangle-up-open": "△", "triangle-down-open": "▽", "star-open": "☆", "x-open": "✕", arrow: "➜" };
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
      for (const [key, patch] of Object.entries(figure.narrow || {})) layout[key] = patch instanceof Object ? { ...layout[key], ...patch } : patch;
    }
    for (const key of ["xaxis", "yaxis"]) {
      layout[key] = { ...axis, ...layout[key] };
      if (layout[key].title) layout[key].title.font = { size: narrow ? 11 : 13, color: colour("--quiet") };
    }
    if (layout.polar) {
      for (const key of ["radialaxis", "angularaxis"]) Object.assign(layout.polar[key], { gridcolor: colour("--line"), linecolor: colour("--line") });
    }
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: colour("--ink") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left", namelength: -1 },
      margin: { l: 8, r: 12, t: 8, b: 36 },
      ...layout,
    };
  };

  // Whiskers are drawn over bars of all colours and over the background; an unknown one has no length, not the length 0.
  const known = (lengths) => lengths.map((length) => length ?? undefined);
  const traced = (figure) => structuredClone(figure.data).map((trace) => {
    const whiskers = trace.error_x;
    if (whiskers) Object.assign(whiskers, { color: colour("--ink"), array: known(whiskers.array), arrayminus: known(whiskers.arrayminus) });
    return trace;
  });

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
    place.dispatchEvent(new Event("scroll"));
  };

  // What is cut by the edge of its part is said below it, and only such a part is a stop of the keyboard.
  for (const part of document.querySelectorAll(".scroll")) {
    const hint = make("p", { className: "hint", hidden: true });
    part.parentElement.after(hint);
    const look = () => {
      const wide = part.scrollWidth > part.clientWidth + 1, high = part.scrollHeight > part.clientHeight + 1;
      const more = part.scrollWidth - part.clientWidth - part.scrollLeft > 1;
      part.parentElement.toggleAttribute("data-more", more);
      hint.hidden = !(wide || high);
      hint.textContent = wide && high ? "Scroll down and sideways to see more." : wide ? "Scroll sideways to see more →" : "Scroll down to see more ↓";
      if (wide || high) part.tabIndex = 0;
      else part.removeAttribute("tabindex");
    };
    part.addEventListener("scroll", look, { passive: true });
    new ResizeObserver(look).observe(part);
    look();
  }

  for (const box of document.querySelectorAll(".copy")) {
    const text = box.querySelector("pre");
    const button = make("button", { type: "button", textContent: "Copy" });
    const bySelection = () => {
      const range = document.createRange();
      range.selectNodeContents(text);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      return document.execCommand("copy");
    };
    button.addEventListener("click", async () => {
      const copied = await (navigator.clipboard?.writeText(text.textContent) ?? Promise.reject()).then(() => true, bySelection);
      button.textContent = copied ? "Copied" : "Press Ctrl+C";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    box.append(button);
  }

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
        const mark = make("span", { textContent: (trace.marker?.pattern ? "▨" : GLYPHS[trace.marker?.symbol] ?? "■") + " " });
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
      const layout = laidOut(figure, document.documentElement.clientWidth);
      place.style.height = layout.height + "px";
      fillLegend(figure);
      fillNumbers();
      return Plotly.react(place, traced(figure), layout, { displayModeBar: false, responsive: true });
    };
    numbers.addEventListener("toggle", fillNumbers);
    return draw;
  });
  let turns = 0;
  const drawAll = () => {
    const turn = ++turns;
    delete document.documentElement.dataset.drawn;
    return Promise.all(plots.map((draw) => draw())).then(() => { if (turn === turns) document.documentElement.dataset.drawn = "yes"; });
  };
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
    const button = make("button", { type: "button" }, ...heading.childNodes);
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
  drawAll();
})();
