// Timeline.
const saves = R.saves.filter(s => s.parts.length), processes = [...new Set(saves.flatMap(s => s.parts.map(p => p[P.process])))].sort((a, b) => a - b);
const longest = peak(saves.map(duration), 0.001);
const starts0 = [...R.spans.map(s => s[1]), ...R.epochs.map(e => e.opened), ...saves.slice(0, 1).map(s => s.began)];
const first = starts0.length ? starts0.reduce((a, b) => Math.min(a, b)) : 0;
const final = peak([...R.spans.map(s => s[2]), ...saves.map(s => s.began + duration(s))], first + 0.01);
let view = [first, final], rows = processes.slice(0, 32), top0 = 0;
const LABEL = 96, BAND = 24;  // above the hosts: where the time went, and what happened
const TALLEST = 8000; let ROW = 22;  // thousands of hosts have thinner rows: a canvas has a largest size
function slowestFirst() { const until = {}; for (const s of saves) for (const p of s.parts) if (p[P.waiting] >= 0)
  (until[p[P.process]] = until[p[P.process]] || []).push(p[P.waiting]);
  const middle = new Map(processes.map(p => [p, median(until[p] || [0])])); return [...processes].sort((a, b) => middle.get(b) - middle.get(a)); }
for (const [value, text] of [["first", "first 32"], ["slow", "slowest 8"], ["every", "all " + processes.length]])
  if (value === "first" ? processes.length <= 32 : true) { const o = el("option", value === "first" ? "all " + processes.length : text); o.value = value;
    if (!(value === "every" && processes.length <= 32)) $("rows").append(o); }
$("rows").onchange = () => { const v = $("rows").value; rows = v === "slow" ? slowestFirst().slice(0, 8) : v === "every" ? processes : processes.slice(0, 32); draw(); };
if (processes.length > 32) { rows = slowestFirst().slice(0, 8); }
function lastSaves(n, at) { if (!saves.length) return; const to = at == null ? saves.length - 1 : at, from = Math.max(0, to - n + 1);
  const a = saves[from].began, b = peak(saves.slice(from, to + 1).map(s => s.began + duration(s)), a + 1e-6), pad = (b - a) * 0.04; view = [a - pad, b + pad]; }
function from(t) { let lo = 0, hi = saves.length; while (lo < hi) { const mid = (lo + hi) >> 1; if (saves[mid].began < t) lo = mid + 1; else hi = mid; } return lo; }
let hits = [];
function draw() { ROW = Math.max(3, Math.min(22, Math.floor(TALLEST / Math.max(1, rows.length)))); const bar = ROW < 12 ? ROW - 1 : ROW - 8, pad = ROW < 12 ? 0 : 4, each = Math.ceil(12 / ROW);
  const canvas = $("timeline"), [c, width, height] = prepare(canvas, BAND + 26 + ROW * Math.max(1, rows.length));
  const x = t => LABEL + (t - view[0]) / (view[1] - view[0]) * (width - LABEL - 8), fg = css("--fg"), soft = css("--soft"), colors = COLORS.map(css);
  hits = []; axis(c, width, height, x); band(c, width, height, x);
  rows.forEach((process, i) => { if (i % each) return; c.fillStyle = fg; c.textAlign = "right"; c.textBaseline = "middle";
    c.fillText(host(process).slice(-15), LABEL - 8, BAND + i * ROW + ROW / 2 + 2); });
  const place = new Map(rows.map((process, i) => [process, BAND + i * ROW + pad])), drawn = new Float64Array(rows.length).fill(-1);
  for (let i = from(view[0] - longest); i < saves.length && saves[i].began <= view[1]; i++) { const save = saves[i];
    for (const p of save.parts) { const y = place.get(p[P.process]); if (y == null) continue;
      const begun = starts(p), stop = end(p), x0 = x(p[P.began]), x1 = x(p[P.began] + stop), row = Math.round((y - pad - BAND) / ROW);
      if (x1 < LABEL || x0 > width) continue;
      if (x1 - drawn[row] < 0.7) continue;  // more than one save in a pixel: the next ones would not be seen
      drawn[row] = x1; hits.push([Math.max(LABEL, x0), Math.max(x1, x0 + 2), y, save, p]);
      let k = 0; while (k < 5) { if (begun[k] < 0) { k++; continue; } let n = k + 1; while (n < 5 && begun[n] < 0) n++;
        const a = Math.max(LABEL, x(p[P.began] + begun[k])), b = x(p[P.began] + (n < 5 ? begun[n] : stop)); c.fillStyle = colors[k];
        if (b > a) c.fillRect(a, y, Math.max(0.6, b - a), bar); k = n; }
      if (x1 - x0 < 2) { c.fillStyle = colors[1]; c.fillRect(x0, y, 1.5, bar); }
      if (save.outcome !== "committed") { c.strokeStyle = css("--bad"); c.lineWidth = 2; c.strokeRect(Math.max(LABEL, x0), y - 1, Math.max(2, x1 - Math.max(LABEL, x0)), bar + 2); } } }
  if (!saves.length) { c.fillStyle = soft; c.textAlign = "left"; c.fillText("no events of this run: its phases were not recorded", LABEL, BAND + 14); }
  $("span").textContent = `${moment(view[0])}, ${secs(view[1] - view[0])} shown`; statistics(); curve(); strip(); }
function axis(c, width, height, x) { const span = view[1] - view[0], steps = [0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800];
  const step = steps.find(s => span / s < width / 110) || 604800 * 4; c.fillStyle = css("--soft"); c.strokeStyle = css("--line"); c.textAlign = "center"; c.textBaseline = "alphabetic"; c.lineWidth = 1;
  c.fillText(R.zone, LABEL / 2, height - 6);
  // Fractions of a second are counted from the left edge.
  const off = step < 1 ? -view[0] : R.utc_offset_s; for (let t = Math.ceil((view[0] + off) / step) * step - off; t <= view[1]; t += step) { const at = x(t); if (at < LABEL + 20 || at > width - 30) continue;
    c.beginPath(); c.moveTo(at, 0); c.lineTo(at, height - 18); c.stroke();
    const text = step < 1 ? "+" + secs(t - view[0]) : step < 86400 ? clock(t).slice(11) : clock(t).slice(0, 10); c.fillText(text, at, height - 6); } }
function strip() { const [c, width, height] = prepare($("strip"), 34), x = t => (t - first) / (final - first || 1) * width; let seen = -1;
  for (const s of saves) { const at = x(s.began), bad = s.outcome !== "committed"; if (at - seen < 0.5 && !bad) continue; seen = at;
    c.fillStyle = css(bad ? "--bad" : "--write"); c.fillRect(at, bad ? 2 : 8, Math.max(1, x(s.began + duration(s)) - at), bad ? 30 : 18); }
  for (const e of R.epochs) { c.fillStyle = css("--fg"); c.fillRect(x(e.opened), 0, 1, height); }
  c.strokeStyle = css("--accent"); c.lineWidth = 2; const a = Math.max(1, x(view[0])); c.strokeRect(a, 1, Math.max(3, Math.min(width - 1, x(view[1])) - a), height - 2); }
function zoom(factor, at) { const middle = at == null ? (view[0] + view[1]) / 2 : at; view = [middle - (middle - view[0]) * factor, middle + (view[1] - middle) * factor]; draw(); }
function timeAt(event) { const box = $("timeline").getBoundingClientRect(); return view[0] + (event.clientX - box.left - LABEL) / (box.width - LABEL - 8) * (view[1] - view[0]); }
$("in").onclick = () => zoom(0.5); $("out").onclick = () => zoom(2); $("all").onclick = () => { view = [first, final]; draw(); }; $("last").onclick = () => { lastSaves(8); draw(); };
$("prev").onclick = () => { lastSaves(1, Math.max(0, from((view[0] + view[1]) / 2) - 2)); draw(); }; $("next").onclick = () => { lastSaves(1, Math.min(saves.length - 1, from((view[0] + view[1]) / 2))); draw(); };
// A wheel scrolls the page; with Ctrl (or a pinch) it zooms.
$("timeline").addEventListener("wheel", e => { if (!e.ctrlKey) return; e.preventDefault(); zoom(e.deltaY < 0 ? 0.8 : 1.25, timeAt(e)); }, { passive: false });
$("timeline").onkeydown = e => { const d = view[1] - view[0]; if (e.key === "ArrowLeft") view = [view[0] - d / 5, view[1] - d / 5]; else if (e.key === "ArrowRight") view = [view[0] + d / 5, view[1] + d / 5]; else if (e.key === "+") return zoom(0.5); else if (e.key === "-") return zoom(2); else return; e.preventDefault(); draw(); };
let grab = null; $("timeline").onpointerdown = e => { grab = [e.clientX, ...view]; $("timeline").setPointerCapture(e.pointerId); };
$("timeline").onpointerup = $("timeline").onpointercancel = () => { grab = null; };
$("timeline").onpointermove = e => { const box = $("timeline").getBoundingClientRect();
  if (grab) { const d = (e.clientX - grab[0]) / (box.width - LABEL - 8) * (grab[2] - grab[1]); view = [grab[1] - d, grab[2] - d]; draw(); return; }
  const px = e.clientX - box.left, py = e.clientY - box.top, hit = hits.find(([a, b, y]) => px >= a - 1 && px <= b + 1 && py >= y - 2 && py <= y + ROW - 6), tip = $("tip");
  if (!hit && py < BAND) { const t = timeAt(e), near = (view[1] - view[0]) / Math.max(1, box.width) * 6, s = R.spans.find(s => t >= s[1] && t <= s[2]), i = R.incidents.find(i => Math.abs(i.time - t) < near);
    if (s || i) return showTip([...(s ? [`${SPANS[s[0]][1]}: ${secs(s[2] - s[1])}`, `from ${moment(s[1])}`] : []), ...(i ? [`${i.kind}, ${moment(i.time)}`, i.text.slice(0, 140)] : [])], e); }
  if (!hit) { tip.style.display = "none"; return; } const [, , , s, p] = hit, begun = starts(p), lines = [`step ${s.step} ${s.attempt}: ${s.outcome}`, `${host(p[P.process])}, ${moment(p[P.began])}`];
  begun.forEach((a, k) => { if (a < 0) return; const later = begun.slice(k + 1).filter(n => n >= 0); lines.push(`${(WORD[PHASES[k]] || PHASES[k]).padEnd(14)} ${secs((later.length ? later[0] : end(p)) - a)}`); });
  lines.push(`written        ${size(p[P.bytes])}`, `blocked        ${secs(p[P.blocked])}`); if (s.reason) lines.push(s.reason.slice(0, 120));
  showTip(lines, e); };
$("timeline").onpointerleave = () => { $("tip").style.display = "none"; };
// Drag on the strip: that range is shown, with its statistics. A click moves there.
let picked = null; const stripTime = e => { const box = $("strip").getBoundingClientRect(); return first + Math.max(0, Math.min(1, (e.clientX - box.left) / box.width)) * (final - first); };
$("strip").onpointerdown = e => { picked = stripTime(e); $("strip").setPointerCapture(e.pointerId); };
$("strip").onpointermove = e => { if (picked == null) return; const t = stripTime(e); if (Math.abs(t - picked) > (final - first) / 200) { view = [Math.min(t, picked), Math.max(t, picked)]; draw(); } };
$("strip").onpointerup = e => { if (picked == null) return; const t = stripTime(e); if (Math.abs(t - picked) <= (final - first) / 200) { const d = (view[1] - view[0]) / 2; view = [t - d, t + d]; draw(); } picked = null; };
$("strip").onpointercancel = () => { picked = null; };

function band(c, width, height, x) { c.fillStyle = css("--fg"); c.textAlign = "right"; c.textBaseline = "middle"; c.fillText("the run", LABEL - 8, BAND / 2);
  c.fillStyle = css("--good"); const a0 = Math.max(LABEL, x(first)), b0 = Math.min(width - 8, x(final)); if (b0 > a0) c.fillRect(a0, 6, b0 - a0, 12);
  for (const s of R.spans) { const a = Math.max(LABEL, x(s[1])), b = Math.min(width - 8, x(s[2])); if (b <= a) continue;
    c.fillStyle = css(SPANS[s[0]][0]); c.fillRect(a, 6, Math.max(1, b - a), 12);
    if (s[0] === "stalled" || s[0] === "down") { c.globalAlpha = 0.12; c.fillRect(a, BAND, Math.max(1, b - a), height - BAND - 20); c.globalAlpha = 1; } }
  let seen = -9; for (const i of R.incidents) { const at = x(i.time); if (at < LABEL || at > width - 8 || at - seen < 2) continue; seen = at;
    const good = i.kind === "restart" || i.kind === "released"; c.strokeStyle = css(good ? "--accent" : "--bad"); c.lineWidth = 1.5; c.setLineDash(good ? [4, 3] : []); c.beginPath(); c.moveTo(at, 2); c.lineTo(at, height - 20); c.stroke(); c.setLineDash([]);
    c.fillStyle = c.strokeStyle; c.beginPath(); c.moveTo(at - 5, 0); c.lineTo(at + 5, 0); c.lineTo(at, 8); c.fill(); } }

// The range that is shown, in numbers.
function inside() { const found = []; for (let i = from(view[0]); i < saves.length && saves[i].began <= view[1]; i++) found.push(saves[i]); return found; }
function statistics() { const mine = inside(), done = mine.filter(s => s.outcome === "committed"), parts = [`${done.length} committed, ${mine.length - done.length} not`];
  if (done.length) parts.push(`save to commit ${secs(median(done.map(duration)))} median, ${secs(peak(done.map(duration), 0))} longest`, `blocked ${secs(mine.reduce((n, s) => n + blocked(s), 0))}`);
  for (const kind in SPANS) { const n = R.spans.reduce((n, s) => s[0] === kind ? n + Math.max(0, Math.min(s[2], view[1]) - Math.max(s[1], view[0])) : n, 0); if (n > 0.05) parts.push(`${SPANS[kind][1]} ${secs(n)}`); }
  $("stats").textContent = "In this range: " + parts.join("; "); }

// A metric under the saves, on the same axis of time.
const metricNames = [...new Set(R.saves.flatMap(s => numbers(s).map(([k]) => k)))].sort((a, b) => (b === "loss") - (a === "loss"));
for (const name of metricNames) { const o = el("option", name); o.value = name; $("metric").append(o); }
if (!metricNames.length) $("curvepart").hidden = true;
$("metric").onchange = () => draw();
let dots = [];
function curve() { if (!metricNames.length) return; const [c, width, height] = prepare($("curve"), 110), name = $("metric").value, bottom = height - 20, x = t => LABEL + (t - view[0]) / (view[1] - view[0]) * (width - LABEL - 8);
  axis(c, width, height, x); const points = R.saves.filter(s => typeof s.metrics[name] === "number"), near = points.filter(s => s.began >= view[0] && s.began <= view[1]).map(s => s.metrics[name]); dots = [];
  if (!near.length) { c.textAlign = "left"; c.fillText("no value in this range", LABEL, 20); return; }
  let low = near.reduce((a, b) => Math.min(a, b)), high = near.reduce((a, b) => Math.max(a, b)); if (low === high) { low -= Math.abs(low) / 10 || 1; high += Math.abs(high) / 10 || 1; }
  const y = v => bottom - 6 - (v - low) / (high - low) * (bottom - 16), step = nice(high - low, 4); c.textAlign = "right"; c.textBaseline = "middle"; c.fillStyle = css("--soft");
  c.fillText(name.slice(0, 14), LABEL - 6, 8); for (let v = Math.ceil(low / step) * step; v <= high; v += step) if (y(v) > 18) c.fillText(String(+v.toPrecision(6)), LABEL - 6, y(v));  // not into the name
  c.save(); c.beginPath(); c.rect(LABEL, 0, width - LABEL - 8, height); c.clip(); c.strokeStyle = c.fillStyle = css("--accent"); c.lineWidth = 1.5; let epoch = null, last = -9; c.beginPath();
  for (const s of points) { const at = x(s.began); if (at < LABEL - 400 || at > width + 400) { epoch = null; continue; } if (s.epoch === epoch && at - last < 0.7 && at >= last) continue; last = at;
    if (s.epoch === epoch) c.lineTo(at, y(s.metrics[name])); else c.moveTo(at, y(s.metrics[name])); epoch = s.epoch; dots.push([at, y(s.metrics[name]), s]); }
  c.stroke(); if (dots.length < 400) for (const [a, b] of dots) c.fillRect(a - 2, b - 2, 4, 4); c.restore(); }
$("curve").onpointermove = e => { const box = $("curve").getBoundingClientRect(), px = e.clientX - box.left; let best = null; for (const d of dots) if (!best || Math.abs(d[0] - px) < Math.abs(best[0] - px)) best = d;
  if (best && Math.abs(best[0] - px) < 30) showTip([`step ${best[2].step}: ${$("metric").value} = ${+best[2].metrics[$("metric").value].toPrecision(6)}`, moment(best[2].began)], e); else hideTip(); };
$("curve").onpointerleave = hideTip;

