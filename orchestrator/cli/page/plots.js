// Sizes, times, rates.
function plot(id, height, series, label, log) { const [c, width] = prepare($(id), height), left = 82, bottom = height - 20, all = series.flatMap(s => s.points.map(p => p[1])).filter(v => v > 0);
  c.fillStyle = css("--soft"); c.textBaseline = "middle"; c.textAlign = "right";
  if (!all.length) { c.textAlign = "left"; c.fillText("no events of this run", 12, 18); return; }
  let low = log ? all.reduce((a, b) => Math.min(a, b)) * 0.8 : 0, high = peak(all, 0) * (log ? 1.3 : 1.1); const y = v => bottom - (log ? Math.log(v / low) / Math.log(high / low) : v / high) * (bottom - 10);
  const xs = series.flatMap(s => s.points.map(p => p[0])), x0 = xs.reduce((a, b) => Math.min(a, b)), x1 = peak(xs, x0 + 1), x = v => left + (v - x0) / (x1 - x0) * (width - left - 14);
  const marks = log ? [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000].filter(v => v >= low && v <= high) : Array.from({ length: 6 }, (_, i) => i * niceBytes(high / 3)).filter(v => v <= high);
  for (const v of marks) { c.strokeStyle = css("--line"); c.lineWidth = 1; c.beginPath(); c.moveTo(left, y(v || 0.0001)); c.lineTo(width, y(v || 0.0001)); c.stroke(); c.fillText(label(v), left - 6, y(v || 0.0001)); }
  c.textAlign = "center"; const tick = Math.max(1, nice(x1 - x0, width / 110)); for (let v = Math.ceil(x0 / tick) * tick, i = 0; v <= x1; v += tick, i++) c.fillText((i ? "" : "step ") + Math.round(v), Math.min(width - 24, Math.max(left + 20, x(v))), height - 8);
  for (const s of series) { c.fillStyle = css(s.color); for (const [a, v] of s.points) if (v > 0) c.fillRect(x(a) - 1.5, y(v) - 1.5, 3, 3); }
  $(id).onpointermove = e => { const box = $(id).getBoundingClientRect(), at = x0 + (e.clientX - box.left - left) / (box.width - left - 14) * (x1 - x0); let best = null;
    for (const s of series) for (const p of s.points) if (p[1] > 0 && (best == null || Math.abs(p[0] - at) < Math.abs(best - at))) best = p[0];
    if (best == null) return; showTip(["step " + best, ...series.flatMap(s => s.points.filter(p => p[0] === best && p[1] > 0).map(p => `${s.name.padEnd(22)} ${label(p[1])}`))], e); };
  $(id).onpointerleave = hideTip; }
function niceBytes(n) { return 2 ** Math.ceil(Math.log2(Math.max(1, n))); }
function plots() { plot("times", 230, [{ name: "from save to commit", color: "--write", points: saves.filter(s => s.outcome === "committed").map(s => [s.step, duration(s)]) }, { name: "training blocked", color: "--stage", points: saves.map(s => [s.step, blocked(s)]) },
    { name: "not committed", color: "--bad", points: saves.filter(s => s.outcome !== "committed").map(s => [s.step, duration(s)]) }], secs, true);
  plot("rates", 130, [{ name: "written by all hosts", color: "--seal", points: saves.map(s => [s.step, rate(s) || 0]) }], v => size(v) + "/s", false); }

