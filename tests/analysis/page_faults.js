// Gives what is wrong with how a page is laid out now, each as a line: measured, not looked at.
(() => {
  const faults = new Set();
  const width = document.documentElement.clientWidth;
  const say = (what, element) => faults.add(`${element.closest(".frame").dataset.page ?? "page"}: ${what}: ${(element.getAttribute?.("aria-label") || element.textContent).trim().replace(/\s+/g, " ").slice(0, 60)}`);
  const shown = (element) => element.checkVisibility({ visibilityProperty: true }) && !element.closest(".unseen, option");

  if (document.documentElement.scrollWidth > width) faults.add(`the page is ${document.documentElement.scrollWidth} wide in a window of ${width}`);
  for (const frame of document.querySelectorAll(".frame")) {
    if (frame.scrollWidth > width) say(`is ${frame.scrollWidth} wide in a window of ${width}`, frame);
  }

  for (const card of document.querySelectorAll(".card")) {
    if (!shown(card)) continue;
    const { left, right, width: wide, height } = card.getBoundingClientRect();
    if (wide < 280 || left < 0 || right > width) say(`a card is ${Math.round(wide)} wide, from ${Math.round(left)}`, card);
    if (height < 60 || !card.textContent.trim()) say("a card is empty", card);
  }

  for (const plot of document.querySelectorAll(".plot")) {
    if (!shown(plot)) continue;
    const svg = plot.querySelector(".main-svg");
    const box = plot.getBoundingClientRect();
    if (!svg || box.width < 250 || box.height < 100) { say(`a figure is ${Math.round(box.width)} by ${Math.round(box.height)}`, plot); continue; }
    if (!plot.getAttribute("aria-label")) say("a figure has no label", plot.closest("section"));
    const texts = [...plot.querySelectorAll("text")].filter((t) => t.textContent.trim() && t.getClientRects().length);
    if (texts.length < 2) say("a figure has no words at its axes", plot);
    for (const text of texts) {
      const { left, right, top, bottom } = text.getBoundingClientRect();
      if (left < box.left - 1 || right > box.right + 1 || top < box.top - 2 || bottom > box.bottom + 2) say(`a label is cut at the edge of ${plot.getAttribute("aria-label")}`, text);
    }
  }

  for (const wide of document.querySelectorAll("main table, main pre")) {
    if (!shown(wide)) continue;
    const part = wide.closest(".scroll");
    if (!part) { say("is in no part that scrolls", wide); continue; }
    const { left, right } = part.getBoundingClientRect();
    if (left < 0 || right > width) say("a part that scrolls is wider than the page", part);
    const hint = part.parentElement.nextElementSibling;
    const isCut = part.scrollWidth > part.clientWidth + 1 || part.scrollHeight > part.clientHeight + 1;
    if (isCut !== (hint.matches(".hint") && shown(hint))) say(isCut ? "is cut without a hint" : "has a hint without need", part);
    if (isCut !== part.hasAttribute("tabindex")) say(isCut ? "scrolls out of the keyboard's reach" : "stops the keyboard without need", part);
    if (!part.getAttribute("aria-label")) say("a part that scrolls has no name", part);
  }

  for (const text of document.querySelectorAll(":is(.scroller, .hint) + p:not(.hint)")) {
    if (shown(text) && text.getBoundingClientRect().top - text.previousElementSibling.getBoundingClientRect().bottom < 8) say("touches what is above it", text);
  }

  for (const plot of document.querySelectorAll(".plot")) {
    const named = new Map((plot.data ?? []).filter((t) => t.name && t.marker).map((t) => [t.legendgroup ?? t.name, t]));
    const looks = [...named.values()].map((t) => JSON.stringify([t.type, t.marker.color, t.marker.symbol, t.marker.pattern?.shape]));
    if (new Set(looks).size < looks.length) say(`two of ${looks.length} look the same`, plot);
  }

  // Text: in lines of some letters, and in a colour that can be read on what is behind it.
  const numbers = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((c, i) => c * a + below[i] * (1 - a));
  const grounds = new Map();
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    if (!grounds.has(element)) {
      const colour = numbers(getComputedStyle(element).backgroundColor);
      grounds.set(element, colour[3] === 0 ? ground(element.parentElement) : over(colour, ground(element.parentElement)));
    }
    return grounds.get(element);
  };
  // The colour of the mark of a plot that a text is written in.
  const markBehind = (element) => {
    const text = element.getBoundingClientRect();
    const behind = [...(element.closest("g.trace")?.querySelectorAll("path.point") ?? [])].find((mark) => {
      const r = mark.getBoundingClientRect();
      return r.left <= text.left && r.right >= text.right && r.top - 2 <= text.top && r.bottom + 2 >= text.bottom;
    });
    return behind && numbers(getComputedStyle(behind).fill).slice(0, 3);
  };
  const light = (colour) => colour.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const colours = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    const letters = node.data.trim();
    if (!letters || element.closest("script, style, noscript, .unseen, option, .js-plotly-tester")) continue;
    if (!shown(element)) continue;
    if (!(element instanceof SVGElement) && letters.length > 5) {
      range.selectNodeContents(node);
      const lines = range.getClientRects().length;
      if (lines > 2 && letters.length / lines < 4) say(`${lines} lines of ${Math.round(letters.length / lines)} letters`, element);
    }
    const style = getComputedStyle(element);
    const isDrawn = element instanceof SVGElement;
    const back = isDrawn ? markBehind(element) ?? ground(element.closest(".plot")) : ground(element);
    const key = `${isDrawn ? style.fill : style.color}|${back}|${style.opacity}`;
    if (!colours.has(key)) {
      const colour = numbers(isDrawn ? style.fill : style.color);
      const faint = over([...colour.slice(0, 3), (colour[3] ?? 1) * Number(style.opacity)], back);
      const [low, high] = [light(faint), light(back)].sort((a, b) => a - b);
      colours.set(key, (high + 0.05) / (low + 0.05));
    }
    const size = parseFloat(style.fontSize);
    const enough = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    const mark = element.getAttribute("aria-hidden") === "true";
    if (!mark && colours.get(key) < enough) say(`contrast ${colours.get(key).toFixed(2)}`, element);
  }
  return [...faults];
})()
