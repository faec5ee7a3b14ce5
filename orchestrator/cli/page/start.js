legend("plotlegend", [["from save to commit", "var(--write)"], ["training blocked", "var(--stage)"], ["not committed", "var(--bad)"], ["written by all hosts, per second", "var(--seal)"]]);
legend("legend", PHASES.map((name, k) => [WORD[name] || name, `var(${COLORS[k]})`]).concat([["not committed", "var(--bad)"]]));
legend("spanlegend", [["training", "var(--good)"], ...Object.values(SPANS).map(([color, text]) => [text, `var(${color})`])]);
if (saves.length > 400) lastSaves(60); else view = [first, final]; function redraw() { draw(); plots(); } redraw(); let later = 0; addEventListener("resize", () => { clearTimeout(later); later = setTimeout(redraw, 100); });
// Print is light, whatever the screen is; canvases are drawn again in its colors.
addEventListener("beforeprint", redraw); addEventListener("afterprint", redraw); matchMedia("print").addEventListener("change", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
for (const s of document.querySelectorAll(".scroll")) { s.tabIndex = 0; s.setAttribute("role", "region"); s.setAttribute("aria-label", (s.querySelector("table") || s).id + " table"); s.before(el("div", "wide table: swipe sideways for more", "hint")); }
function hints() { for (const s of document.querySelectorAll(".scroll")) s.previousSibling.hidden = s.scrollWidth <= s.clientWidth; }
hints(); addEventListener("resize", hints);
document.documentElement.dataset.ready = "yes";
