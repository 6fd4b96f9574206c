// Gives the texts of a page that lie over one another.
(() => {
  const texts = [...document.querySelectorAll("h1, h2, h3, caption, th, td, label, legend, .legend button, .plot text")]
    .filter((e) => e.textContent.trim() && e.getClientRects().length && !e.closest("details") && !e.querySelector("th, td"));
  const boxes = texts.map((e) => ({ e, r: e.getBoundingClientRect() }));
  const found = [];
  for (const part of document.querySelectorAll("section, header")) {
    const inside = boxes.filter(({ e }) => part.contains(e));
    inside.forEach(({ e, r }, i) => inside.slice(i + 1).forEach(({ e: f, r: s }) => {
      const wide = Math.min(r.right, s.right) - Math.max(r.left, s.left), high = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
      const scrolled = e.closest(".tall")?.contains(f) || e.closest(".tall") || f.closest(".tall");
      if (wide > 2 && high > 3 && !e.contains(f) && !f.contains(e) && !scrolled) found.push(e.textContent + " | " + f.textContent);
    }));
  }
  return found;
})()
