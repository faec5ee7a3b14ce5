// Stragglers.
const of = new Map(processes.map(p => [p, { until: [], rates: [], slowest: 0 }]));
const compared = saves.some(s => s.parts.length > 1);  // of a save of which one part is known nothing can be compared
for (const s of saves) { if (compared && s.parts.length < 2) continue; let worst = null; for (const p of s.parts) { if (p[P.waiting] < 0) continue; const o = of.get(p[P.process]); o.until.push(p[P.waiting]);
    const busy = p[P.waiting] - Math.max(0, p[P.writing]); if (busy > 0 && p[P.bytes]) o.rates.push(p[P.bytes] / busy); if (!worst || p[P.waiting] > worst[P.waiting]) worst = p; }
  if (worst && s.parts.length > 1) of.get(worst[P.process]).slowest++; }
table("stragglers", [["process", "n"], ["host", "t"], ["saves", "n"], ["median", "n"], ["95 %", "n"], ["longest", "n"], ["slowest of all", "n"], ["rate, median", "n"]],
  [...of].filter(([, o]) => o.until.length).sort((a, b) => b[1].slowest - a[1].slowest || median(b[1].until) - median(a[1].until)).slice(0, 50).map(([p, o]) => [p, host(p), o.until.length, secs(median(o.until)), secs(quantile(o.until, 0.95)), secs(peak(o.until, 0)),
    `${o.slowest} (${(100 * o.slowest / o.until.length).toFixed(0)} %)`, o.rates.length ? size(median(o.rates)) + "/s" : ""]), "no events of this run: hosts cannot be compared");

// Goodput.
const G = R.goodput, split = [["training", G.training_s, "--good"], ["blocked by saves", G.blocked_s, "--stage"], ...["stalled", "again", "starting", "down", "idle"].map(k => [SPANS[k][1], G[k + "_s"], SPANS[k][0]])].filter(([, n]) => n > 0);
$("goodnote").textContent = G.share == null ? "The run is empty." : `Of ${secs(G.wall_s)} from the first start to the last sign of life, ${secs(G.training_s)} went into training: ${(G.share * 100).toFixed(1)} %${G.idle_s > 0 ? ` of all but the ${secs(G.idle_s)} in which nothing ran after a clean end` : ""}. This is measured, and counts everything.`;
for (const [, share, color] of split) { const d = el("div"); d.style.cssText = `background:var(${color});flex:${100 * share / G.wall_s} 0 0;min-width:2px`; $("goodsplit").append(d); }
legend("goodlegend", split.map(([name, n, color]) => [`${name} ${secs(n)} (${(100 * n / G.wall_s).toFixed(1)} %)`, `var(${color})`]));
table("epochs", [["epoch", "n"], ["started", "t"], ["by", "t"], ["processes", "n"], ["from step", "n"], ["restore", "n"], ["the restart cost", "n"], ["ended", "t"]], [...R.epochs].reverse().slice(0, 100).map(e => [e.epoch, moment(e.opened), e.by, e.processes, e.from_step, secs(e.restore_s), e.lost_s ? secs(e.lost_s) : "", e.closed ? "in order" : e.epoch === R.epoch ? "not seen to end" : "abruptly"]), "");
table("intervals", [["a save every", "n"], ["expected", "n"], ["which is", "t"]], R.intervals.map(i => [secs(i.interval_s), (i.share * 100).toFixed(3) + " %", i.mark]), "no save has been measured yet");

// Incidents, steps.
paged("incidents", [["when", "t"], ["what", "t"], ["step", "n"], ["attempt", "t"], ["cause", "long"], ["reported by", ""]], [...R.incidents].reverse(), i => [moment(i.time), el("b", i.kind, i.kind === "restart" || i.kind === "released" ? "" : "bad"), i.step, i.attempt, i.text, i.by], "nothing has gone wrong", 25);
function steps() { const show = $("show").value, find = $("find").value.trim(); let all = R.saves.filter(s => show === "all" || (show === "live" ? s.state === "live" : s.outcome !== "committed" || s.trust === "quarantined"));
  if (find) all = all.filter(s => String(s.step).startsWith(find));
  paged("steps", [["step", "n"], ["attempt", "t"], ["began", "t"], ["outcome", "t"], ["kept", "t"], ["trust", "t"], ["pins", ""], ["size", "n"], ["took", "n"], ["blocked", "n"], ["metrics", ""]], all.reverse(), s => [s.step, s.attempt, moment(s.began), el("span", s.outcome, s.outcome === "committed" ? "" : "bad"),
    s.state, el("span", s.trust, s.trust === "quarantined" ? "bad" : s.trust === "committed" || !s.trust ? "" : "good"), s.pins.join(" "), s.bytes ? size(s.bytes) : "", secs(duration(s)), s.parts.length ? secs(blocked(s)) : "", Object.entries(s.metrics).map(([k, v]) => `${k}=${typeof v === "number" ? +v.toPrecision(5) : v || "NaN"}`).join(" ")], "no such saves", 50); }
$("show").onchange = $("find").oninput = steps; steps();

