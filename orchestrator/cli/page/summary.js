// Summary.
const committed = R.saves.filter(s => s.outcome === "committed"), aborted = R.saves.filter(s => s.outcome !== "committed");
$("title").textContent = R.root; document.title = "Checkpoints of " + R.root;
$("subtitle").textContent = `epoch ${R.epoch}, journal version ${R.version}; made ${moment(R.made)}`;
function tile(value, about, kind) { const t = el("div", null, "tile"); t.append(el("b", value, kind), el("span", about)); $("tiles").append(t); }
tile(R.newest == null ? "none" : R.newest, "newest restorable step", R.newest == null ? "bad" : "");
tile(R.newest_time == null ? "all" : secs(R.made - R.newest_time), "its age when this page was made" + (R.epochs.some(e => e.epoch === R.epoch && e.closed) ? "; the job had ended in order" : ": what a death then would have cost"));
const held = R.saves.filter(s => s.trust === "quarantined").length;
tile(held, held === 1 ? "step quarantined: kept, not restored" : "steps quarantined: kept, not restored", held ? "bad" : "good");
tile(committed.length, "saves committed");
tile(aborted.length, "saves not committed", aborted.length ? "bad" : "good");
const durations = committed.filter(s => s.parts.length).map(duration);
tile(durations.length ? secs(median(durations)) : "–", "from save to commit, median");
tile(durations.length ? secs(median(committed.filter(s => s.parts.length).map(blocked))) : "–", "training blocked by a save, median");
tile(size(R.saves.reduce((n, s) => n + (s.state === "live" ? s.bytes : 0), 0)), "kept now, in " + R.saves.filter(s => s.state === "live").length + " steps");
tile(R.goodput.share == null ? "–" : (R.goodput.share * 100).toFixed(1) + " %", "goodput: the time that went into training (idle time after a clean end is left out)");


// The verdict, and what to look at.
if (R.verdict) { $("verdict").textContent = R.verdict.text; $("verdict").className = R.verdict.tone; }
const WORDS = { bad: "Problem:", warn: "Look at:", good: "Good:", plain: "" };
for (const f of R.findings) { const li = el("li"), a = el("a", f.text); a.href = "#" + f.place;
  a.onclick = () => { if (f.began != null) { const pad = Math.max(5, ((f.ended || f.began) - f.began) * 0.6); view = [f.began - pad, (f.ended || f.began) + pad]; draw(); } };
  li.append(el("b", WORDS[f.tone], f.tone === "bad" ? "bad" : ""), a); $("look").append(li); }
if (!R.findings.length) $("look").append(el("li", "Nothing stands out: no stalls, no aborted saves, no quarantined steps, no stragglers."));

