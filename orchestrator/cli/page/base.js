"use strict";
const R = /*REPORT*/null;
const $ = id => document.getElementById(id);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const PHASES = ["staging", "writing", "sealing", "waiting", "committing"];
const WORD = { sealing: "making durable" };  // of a phase, where it is another than the events'
const COLORS = ["--stage", "--write", "--seal", "--wait", "--commit"];
const P = { process: 0, began: 1, writing: 2, sealing: 3, waiting: 4, committing: 5, ended: 6, blocked: 7, bytes: 8 };

function el(name, text, kind) { const e = document.createElement(name); if (text != null) e.textContent = text;
  if (kind) e.className = kind; return e; }
function size(n) { for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) { if (Math.abs(n) < 1024 || unit === "TiB")
  return (unit === "B" ? n.toFixed(0) : n.toFixed(1)) + " " + unit; n /= 1024; } }
function secs(s) { if (s == null || s < 0) return ""; if (s === 0) return "0 s"; if (s < 0.0995) return (s * 1000).toFixed(s < 0.01 ? 1 : 0) + " ms";
  if (s < 10) return s.toFixed(2) + " s"; if (s < 60) return s.toFixed(0) + " s";
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]]; let rest = Math.round(s), out = [];
  for (const [unit, name] of parts) { const n = Math.floor(rest / unit); rest -= n * unit;
    if (n || out.length) out.push([n, name]); }
  return out.slice(0, 2).filter(([n]) => n).map(([n, name]) => n + " " + name).join(" "); }
function two(n) { return String(n).padStart(2, "0"); }
function clock(t) { const d = new Date((t + R.utc_offset_s) * 1000);  // at the zone of who made the page, which its sentences are in, too
  return `${d.getUTCFullYear()}-${two(d.getUTCMonth() + 1)}-${two(d.getUTCDate())} ${two(d.getUTCHours())}:${two(d.getUTCMinutes())}:${two(d.getUTCSeconds())}`; }
function moment(t) { return clock(t) + " " + R.zone; }
function median(list) { if (!list.length) return null; const s = [...list].sort((a, b) => a - b);
  return (s[(s.length - 1) >> 1] + s[s.length >> 1]) / 2; }
function quantile(list, q) { const s = [...list].sort((a, b) => a - b); return s[Math.min(s.length - 1, Math.floor(q * s.length))]; }
function peak(list, start) { let top = start; for (const n of list) if (n > top) top = n; return top; }
const PROCESSES = new Map(R.epochs.map(e => [e.epoch, e.processes || 0]));
function expected(save) { return PROCESSES.get(save.epoch) || 0; }
function host(process) { return R.hosts[process] || "process " + process; }
function starts(p) { return [0, p[P.writing], p[P.sealing], p[P.waiting], p[P.committing]]; }
function end(p) { return p[P.ended] >= 0 ? p[P.ended] : Math.max(...starts(p)); }
function duration(save) { let e = -1; for (const p of save.parts) e = Math.max(e, end(p));
  return e >= 0 ? e : save.decided != null ? save.decided - save.began : 0; }
function blocked(save) { let b = 0; for (const p of save.parts) b = Math.max(b, p[P.blocked]); return b; }
function rate(save) { let bytes = 0, busy = 0; if (save.parts.length < expected(save)) return null; for (const p of save.parts) { bytes += p[P.bytes];
  if (p[P.waiting] > 0) busy = Math.max(busy, p[P.waiting] - Math.max(0, p[P.writing])); } return busy > 0 ? bytes / busy : null; }
function table(id, columns, rows, empty) { const t = $(id); t.replaceChildren();
  if (!rows.length) { t.append(el("caption", empty, "note")); return; }
  const head = el("tr"); for (const [name, kind] of columns) { const th = el(name ? "th" : "td", name, kind); if (name) th.scope = "col"; head.append(th); } t.append(head);
  for (const row of rows) { const tr = el("tr"); row.forEach((cell, i) => { const td = el("td", null, columns[i][1]);
    if (cell instanceof Node) td.append(cell); else td.textContent = cell == null ? "" : cell; tr.append(td); }); t.append(tr); } }
function paged(id, columns, all, row, empty, per) { let at = 0; const bar = $(id + "pager");
  function show() { table(id, columns, all.slice(at, at + per).map(row), empty); bar.replaceChildren();
    if (all.length <= per) return;
    const step = (text, to, off) => { const b = el("button", text); b.disabled = off; b.onclick = () => { at = to; show(); }; bar.append(b); };
    step("◂ newer", Math.max(0, at - per), at === 0); step("older ▸", at + per, at + per >= all.length);
    bar.append(el("span", `${at + 1} to ${Math.min(at + per, all.length)} of ${all.length}`, "note")); }
  show(); }
function legend(id, items) { $(id).replaceChildren(...items.map(([text, color]) => { const s = el("span"), i = el("i");
  i.style.background = color; s.append(i, text); return s; })); }
function prepare(canvas, height) { const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.style.height = height + "px"; canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  const c = canvas.getContext("2d"); c.setTransform(ratio, 0, 0, ratio, 0, 0); c.clearRect(0, 0, width, height);
  c.font = "11px system-ui, sans-serif"; return [c, width, height]; }

function nice(span, parts) { const raw = span / Math.max(1, parts), power = 10 ** Math.floor(Math.log10(raw)); return [1, 2, 5, 10].map(n => n * power).find(n => n >= raw) || power * 10; }
function showTip(lines, event) { const tip = $("tip"); tip.textContent = lines.join("\n"); tip.style.display = "block";
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px"; tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)) + "px"; }
function hideTip() { $("tip").style.display = "none"; }
const SPANS = { stalled: ["--stalled", "stalled (no step)"], again: ["--again", "steps done again after a restart"], starting: ["--starting", "start-up, restore, first step"],
  down: ["--down", "not running after a failure"], idle: ["--idle", "not running after a clean end"] };
function numbers(save) { return Object.entries(save.metrics).filter(([, v]) => typeof v === "number"); }
