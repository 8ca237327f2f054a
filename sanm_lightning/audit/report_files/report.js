"use strict";
// The report of an audit: one list of samples, shown as images or as a table, with a verdict on each.
// Only what is in view is in the document. Names come from files: they are only ever set as text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows, total = rows.name.length, classes = data.classes;
  const VERDICTS = { wrong: "w", right: "r", drop: "d", ambiguous: "a" };
  const TABLE_LINE = 64, CARD_WIDTH = 180, CARD_LINE = 244, MARGIN = 16, GAP = 12, TALLEST = 15e6, EXTRA_LINES = 4;
  const $ = (id) => document.getElementById(id);
  const list = $("list"), space = $("space");

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
      else element[name] = value;
    }
    element.append(...children);
    return element;
  }
  const percent = (value, digits = 1) => (100 * value).toFixed(digits) + " %";
  const count = (value) => value.toLocaleString("en-US");
  const verdicts = (number) => count(number) + (number === 1 ? " verdict" : " verdicts");
  const reason = (row) => rows.unreadable[row];
  const className = (label) => (label < 0 ? "" : classes[label]);
  const isChange = (row) => rows.suggested[row] >= 0 && rows.suggested[row] !== rows.given[row];
  const value = (column, row) => (reason(row) === undefined ? rows[column][row] / 1e6 : NaN);
  const number = (column, row) => (reason(row) === undefined ? value(column, row).toFixed(3) : "–");

  // ---- images -------------------------------------------------------------------------------------------------
  // Python hands over bytes of names that are not UTF-8 as lone surrogates U+DC80 to U+DCFF.
  const encode = (part) =>
    Array.from(part, (c) => (/^[\udc80-\udcff]$/.test(c) ? "%" + (c.charCodeAt(0) - 0xdc00).toString(16) : encodeURIComponent(c))).join("");
  const encodePath = (path) => path.split("/").map(encode).join("/");

  function addresses(row, large) {
    const path = rows.name[row], found = [];
    if (data.thumbs) found.push(`thumbs/${row + 1}.jpg`);
    else if (path.startsWith("/")) found.push("file://" + encodePath(path));
    else if (/^[A-Za-z]:\//.test(path)) found.push("file:///" + path.slice(0, 2) + encodePath(path.slice(2)));
    else found.push(...data.bases.map((base) => base + encodePath(path)));
    const embedded = data.embedded[row];
    if (embedded) large && !data.thumbs ? found.push(embedded) : found.splice(0, found.length, embedded);
    return found;
  }

  function picture(row, large = false) {
    const box = make("div", { className: "picture" });
    if (reason(row) !== undefined) {
      box.textContent = "unreadable";
      box.title = reason(row);
      return box;
    }
    const sources = addresses(row, large);
    const image = make("img", { alt: "", decoding: "async", draggable: false });
    image.addEventListener("error", () => {
      if (sources.length) image.src = sources.shift();
      else box.replaceChildren("not found");
    });
    const start = () => { if (!image.src && sources.length) image.src = sources.shift(); };
    if (!sources.length) box.textContent = "no image";
    else {
      box.append(image);
      if (sources[0].startsWith("data:") || large) start();
      else box.start = start;  // a file is read when scrolling has come to rest
    }
    return box;
  }

  // ---- verdicts -----------------------------------------------------------------------------------------------
  const prefix = "sanm-audit:" + data.id + ":";
  const ticks = new Map();  // row -> {verdict, label}
  const rowOf = new Map(rows.name.map((name, row) => [name, row]));
  const undoing = [];  // lists of [row, tick before]
  let stored = true;

  function store(row) {
    try {
      const tick = ticks.get(row), key = prefix + rows.name[row];
      if (tick) localStorage.setItem(key, JSON.stringify(tick));
      else localStorage.removeItem(key);
    } catch {
      stored = false;
    }
  }

  function restore() {
    try {
      for (let i = 0; i < localStorage.length; i++) {
        const key = localStorage.key(i), row = key.startsWith(prefix) ? rowOf.get(key.slice(prefix.length)) : undefined;
        if (row === undefined) continue;
        const tick = JSON.parse(localStorage.getItem(key));
        if (tick && Object.hasOwn(VERDICTS, tick.verdict)) ticks.set(row, tick);
      }
    } catch {
      stored = false;
    }
  }

  function apply(changes) {  // [[row, tick or undefined], ...], undone together
    undoing.push(changes.map(([row]) => [row, ticks.get(row)]));
    write(changes);
  }

  function write(changes) {
    for (const [row, tick] of changes) {
      if (tick) ticks.set(row, tick);
      else ticks.delete(row);
      store(row);
    }
    refresh();
  }

  function judge(row, verdict, label) {
    if (verdict === "wrong" && label === undefined) {
      if (!isChange(row)) {
        go(row);
        say("No other label is suggested here: choose the right one.");
        choose();
        return false;
      }
      label = className(rows.suggested[row]);
    }
    if (verdict === "wrong" && label === className(rows.given[row])) {
      say("The new label is the given one: press r if it is right.");
      return false;
    }
    apply([[row, verdict ? { verdict, label: verdict === "wrong" ? label : "" } : undefined]]);
    say(verdict ? `Marked ${verdict}${verdict === "wrong" ? ": " + label : ""}.` : "Verdict removed.");
    return true;
  }

  function undo() {
    const changes = undoing.pop();
    if (!changes) return say("Nothing to undo.");
    write(changes);
    go(changes[0][0]);
    return say(changes.length > 1 ? `${verdicts(changes.length)} undone.` : "Undone.");
  }

  // ---- what is shown, and in which order ------------------------------------------------------------------------
  const COLUMNS = [  // key, title, what it is sorted by
    ["verdict", "verdict", (row) => (ticks.has(row) ? Object.keys(VERDICTS).indexOf(ticks.get(row).verdict) : 9)],
    ["picture", "", null],
    ["rank", "rank", (row) => row],
    ["path", data.key, data.key === "index" ? (row) => Number(rows.name[row]) : (row) => rows.name[row]],
    ["split", "split", (row) => data.splits[rows.split[row]]],
    ["given", "given", (row) => className(rows.given[row])],
    ["suggested", "suggested", (row) => className(rows.suggested[row])],
    ["quality", "quality", (row) => value("quality", row)],
    ["p_given", "p given", (row) => value("p_given", row)],
    ["p_suggested", "p sugg.", (row) => value("p_suggested", row)],
    ["near", "neighbors", null],
  ];
  let sorting = { key: "rank", down: false };
  let shown = [], current = -1, view = "sheet", status = "";

  function select() {
    const text = $("search").value.toLowerCase(), split = $("split").value, given = $("given").value;
    const suggested = $("suggested").value, show = $("show").value;
    const named = classes.map((name) => !text || name.toLowerCase().includes(text));
    const kept = [];
    for (let row = 0; row < total; row++) {
      if (split !== "" && rows.split[row] !== Number(split)) continue;
      if (given !== "" && rows.given[row] !== Number(given)) continue;
      if (suggested !== "" && rows.suggested[row] !== Number(suggested)) continue;
      const tick = ticks.get(row);
      if (show === "differs" ? !isChange(row) : show === "none" ? tick : show === "any" ? !tick : show && (!tick || tick.verdict !== show)) continue;
      if (text && !named[rows.given[row]] && !(rows.suggested[row] >= 0 && named[rows.suggested[row]]) && !rows.name[row].toLowerCase().includes(text)) continue;
      kept.push(row);
    }
    const by = COLUMNS.find(([key]) => key === sorting.key)[2];
    if (sorting.key !== "rank") {
      const keys = new Map(kept.map((row) => [row, by(row)]));
      const collator = new Intl.Collator("en", { numeric: true });
      const blank = (key) => key === "" || Number.isNaN(key);
      const compare = (a, b) => (typeof a === "string" ? collator.compare(a, b) : a - b);
      kept.sort((a, b) => {
        const x = keys.get(a), y = keys.get(b);
        if (blank(x) || blank(y)) return blank(x) - blank(y) || a - b;
        return (sorting.down ? compare(y, x) : compare(x, y)) || a - b;
      });
    } else if (sorting.down) kept.reverse();
    shown = kept;
    if (!shown.includes(current)) current = shown.length ? shown[0] : -1;
    live.forEach((element) => element.remove());
    live.clear();
    list.scrollTop = 0;
    $("sort").value = sorting.key + (sorting.down ? " down" : "");
    headers();
    refresh();
  }

  function sortBy(key) {
    sorting = { key, down: sorting.key === key && !sorting.down };
    select();
  }

  function headers() {
    $("head").replaceChildren(...COLUMNS.map(([key, title, by]) => {
      const sorted = sorting.key === key ? (sorting.down ? "descending" : "ascending") : "none";
      const cell = make("div", { role: "columnheader", "aria-sort": sorted });
      if (by) {
        const mark = sorted === "none" ? "" : sorting.down ? " ▼" : " ▲";
        const button = make("button", { type: "button", textContent: title + mark, onclick: () => sortBy(key) });
        button.dataset.sort = key;
        cell.append(button);
      } else cell.textContent = title;
      return cell;
    }));
  }

  // ---- the list: lines in view, and a few above and below -----------------------------------------------------------
  const live = new Map();  // row -> element
  let resting = 0;

  function geometry() {
    const width = list.clientWidth - 2 * MARGIN + GAP;
    const across = view === "table" ? 1 : Math.max(1, Math.floor(width / CARD_WIDTH)), pitch = width / across;
    const line = view === "table" ? TABLE_LINE : CARD_LINE;
    const lines = Math.ceil(shown.length / across), top = view === "table" ? 0 : MARGIN / 2;
    const height = lines * line + top, room = Math.max(1, list.clientHeight - (view === "table" ? $("head").offsetHeight : 0));
    const held = Math.min(height, TALLEST);  // browsers cannot scroll through any height: from there on, in proportion
    const ratio = held > room ? (height - room) / (held - room) : 1;
    return { across, pitch, line, lines, top, height, room, held, ratio };
  }

  function render() {
    const g = geometry(), offset = list.scrollTop * g.ratio;
    space.style.height = g.held + "px";
    const first = Math.max(0, Math.floor((offset - g.top) / g.line) - EXTRA_LINES);
    const last = Math.min(g.lines, Math.ceil((offset + g.room) / g.line) + EXTRA_LINES);
    const wanted = shown.slice(first * g.across, last * g.across), keep = new Set(wanted);
    for (const [row, element] of live) {
      if (!keep.has(row)) {
        element.remove();
        live.delete(row);
      }
    }
    wanted.forEach((row, i) => {
      let element = live.get(row);
      if (!element) {
        element = item(row);
        live.set(row, element);
        paint(row, element);
      }
      const at = first * g.across + i;
      const x = view === "table" ? 0 : MARGIN + (at % g.across) * g.pitch;
      const y = g.top + Math.floor(at / g.across) * g.line - offset + list.scrollTop;
      element.style.width = view === "table" ? "" : g.pitch - GAP + "px";
      element.style.transform = `translate(${x}px, ${y}px)`;
      element.setAttribute("aria-rowindex", at + 2);
      if (space.children[i] !== element) space.insertBefore(element, space.children[i] || null);
    });
    list.setAttribute("aria-rowcount", shown.length + 1);
    if (live.has(current)) list.setAttribute("aria-activedescendant", live.get(current).id);
    else list.removeAttribute("aria-activedescendant");
    clearTimeout(resting);
    resting = setTimeout(() => live.forEach((element) => element.box.start && element.box.start()), 60);
  }

  function quality(row) {
    const bar = make("span");
    bar.style.width = 100 * (value("quality", row) || 0) + "%";
    return make("div", { className: "quality", role: "gridcell", title: "quality: probability that the given label is right" },
      make("span", { textContent: number("quality", row) }), make("div", { className: "meter" }, bar));
  }

  function buttons(row, words) {
    return Object.entries(VERDICTS).map(([verdict, key]) =>
      make("button", {
        type: "button", className: "tick " + verdict, textContent: words ? verdict : key.toUpperCase(), tabIndex: words ? 0 : -1,
        title: `${verdict} (${key})`, "aria-label": verdict, "aria-pressed": "false",
        onclick: (event) => {
          event.stopPropagation();
          go(row, false);
          const tick = ticks.get(row);
          judge(row, tick && tick.verdict === verdict ? null : verdict);
        },
      }));
  }

  function labels(row) {
    const box = make("div", { className: "labels", role: "gridcell" }, className(rows.given[row]));
    if (isChange(row)) box.append(make("span", { className: "arrow", textContent: " → " }), className(rows.suggested[row]));
    box.title = box.textContent;
    return box;
  }

  function neighbors(row) {
    if (!rows.near || !rows.near[row]) return "";
    const counts = new Map();
    rows.near[row].forEach((label) => counts.set(label, (counts.get(label) || 0) + 1));
    return [...counts].sort((a, b) => b[1] - a[1]).map(([label, times]) => `${times} ${classes[label]}`).join(", ");
  }

  function item(row) {
    const cell = (name, text, title = text) => make("div", { className: name, role: "gridcell", textContent: text, title });
    const element = make("div", { className: "item", role: "row", id: "row-" + row });
    const box = picture(row), verdict = make("div", { className: "ticks", role: "gridcell" }, ...buttons(row));
    element.box = box;
    const held = make("div", { role: "gridcell" }, box);
    if (view === "sheet") element.append(held, labels(row), quality(row), verdict);
    else {
      const renamed = make("button", {
        type: "button", className: "renamed", tabIndex: -1, title: "choose another label",
        onclick: (event) => { event.stopPropagation(); go(row, false); choose(); },
      });
      verdict.append(renamed);
      element.append(verdict, held, cell("number", count(row + 1)), cell("path", rows.name[row]),
        cell("split", data.splits[rows.split[row]]), cell("given", className(rows.given[row])),
        cell("suggested", className(rows.suggested[row])), quality(row), cell("number", number("p_given", row)),
        cell("number", number("p_suggested", row)), cell("near", reason(row) === undefined ? neighbors(row) : "unreadable: " + reason(row)));
    }
    element.addEventListener("click", () => { go(row, false); list.focus({ preventScroll: true }); });
    return element;
  }

  function paint(row, element) {
    const tick = ticks.get(row);
    element.className = "item" + (row === current ? " current" : "") + (tick ? " has-" + tick.verdict : "");
    element.setAttribute("aria-selected", row === current);
    const words = [rows.name[row], "given " + className(rows.given[row])];
    if (isChange(row)) words.push("suggested " + className(rows.suggested[row]));
    if (tick) words.push("marked " + tick.verdict);
    element.setAttribute("aria-label", words.join(", "));
    for (const button of element.querySelectorAll(".tick")) {
      button.setAttribute("aria-pressed", Boolean(tick && button.classList.contains(tick.verdict)));
    }
    const renamed = element.querySelector(".renamed");
    if (renamed) {
      renamed.textContent = tick && tick.verdict === "wrong" ? "→ " + tick.label : "";
      renamed.hidden = !renamed.textContent;
    }
    if (view === "sheet" && tick && tick.verdict === "wrong") {
      const box = element.querySelector(".labels");
      box.replaceChildren(className(rows.given[row]), make("span", { className: "arrow", textContent: " → " }), tick.label);
    } else if (view === "sheet") element.querySelector(".labels").replaceWith(labels(row));
  }

  function refresh() {
    render();
    live.forEach((element, row) => paint(row, element));
    detail();
    report();
  }

  // ---- the selected sample --------------------------------------------------------------------------------------
  let detailed = -1, picking = false;

  function detail() {
    const panel = $("detail");
    if (current < 0) {
      detailed = -1;
      return panel.replaceChildren(make("p", { textContent: "No sample is shown: change the filter." }));
    }
    const tick = ticks.get(current), row = current;
    if (detailed !== row) {
      detailed = row;
      const chooser = make("select", { id: "new-label" });
      chooser.append(make("option", { value: "", textContent: "choose …" }));
      classes.forEach((name, label) => chooser.append(make("option", { value: String(label), textContent: name, disabled: label === rows.given[row] })));
      chooser.append(make("option", { value: "new", textContent: "a new class …" }));
      const typed = make("input", { id: "new-class", placeholder: "name of the new class", hidden: true, "aria-label": "name of the new class" });
      chooser.onchange = () => {
        typed.hidden = chooser.value !== "new";
        if (chooser.value === "new") return typed.focus();
        if (picking) list.focus({ preventScroll: true });  // called by a key, so the keys go on in the list
        picking = false;
        if (chooser.value === "") judge(row, null);
        else judge(row, "wrong", classes[Number(chooser.value)]);
        return undefined;
      };
      typed.onchange = () => { if (typed.value.trim()) judge(row, "wrong", typed.value.trim()); };
      const facts = make("dl");
      const fact = (name, text) => text !== "" && facts.append(make("dt", { textContent: name }), make("dd", { textContent: text }));
      fact(data.key, rows.name[row]);
      fact("split", data.splits[rows.split[row]]);
      fact("rank", `${count(row + 1)} of ${count(total)}`);
      if (reason(row) === undefined) {
        fact("quality", number("quality", row));
        fact("p given", number("p_given", row));
        fact("p suggested", `${number("p_suggested", row)} (${className(rows.suggested[row])})`);
        fact("neighbors", neighbors(row));
      } else fact("unreadable", reason(row));
      panel.replaceChildren(picture(row, true), labels(row), make("div", { className: "ticks" }, ...buttons(row, true)),
        make("label", {}, "new label ", chooser), typed, facts);
    }
    for (const button of panel.querySelectorAll(".tick")) {
      button.setAttribute("aria-pressed", Boolean(tick && button.classList.contains(tick.verdict)));
    }
    const label = tick && tick.verdict === "wrong" ? tick.label : null, known = classes.indexOf(label);
    $("new-label").value = label === null ? "" : known >= 0 ? String(known) : "new";
    $("new-class").hidden = label === null || known >= 0;
    if (label !== null && known < 0) $("new-class").value = label;
    return undefined;
  }

  function choose() {
    const chooser = $("new-label");
    if (!chooser) return;
    chooser.focus();
    picking = true;
    try { chooser.showPicker(); } catch { /* not without a gesture, or not in this browser */ }
  }

  function go(row, scroll = true) {
    const before = current, at = shown.indexOf(row);
    if (at < 0) return;
    current = row;
    if (scroll) {
      const g = geometry(), top = g.top + Math.floor(at / g.across) * g.line, offset = list.scrollTop * g.ratio;
      if (top < offset) list.scrollTop = (top - g.top) / g.ratio;
      else if (top + g.line > offset + g.room) list.scrollTop = Math.ceil((top + g.line - g.room) / g.ratio);
    }
    render();
    for (const changed of [before, current]) if (live.has(changed)) paint(changed, live.get(changed));
    detail();
  }

  function step(by) {
    if (!shown.length) return;
    const at = Math.max(0, shown.indexOf(current));
    go(shown[Math.min(shown.length - 1, Math.max(0, at + by))]);
  }

  function find(name) {  // a sample of the summary's lists
    for (const id of ["search", "split", "given", "suggested", "show"]) $(id).value = "";
    select();
    go(rowOf.get(name));
    list.focus({ preventScroll: true });
  }

  // ---- accepted.csv ---------------------------------------------------------------------------------------------
  const HEADER = [data.key, "split", "given_label", "verdict", "new_label"];
  const escapeCell = (text) => (/^'*[=+\-@\t\r]/.test(text) ? "'" + text : text);
  const unescapeCell = (text) => (/^'+[=+\-@\t\r]/.test(text) ? text.slice(1) : text);
  const quote = (text) => (/[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text);

  function accepted() {
    const lines = [HEADER.join(",")];
    for (const row of [...ticks.keys()].sort((a, b) => a - b)) {
      const tick = ticks.get(row);
      const cells = [rows.name[row], data.splits[rows.split[row]], className(rows.given[row]), tick.verdict, tick.label];
      lines.push(cells.map((cell) => quote(escapeCell(cell))).join(","));
    }
    return lines.join("\r\n") + "\r\n";
  }

  function save() {
    // Bytes of names that are not UTF-8 go out as they came.
    const parts = accepted().split(/([\udc80-\udcff])/u).map((part) =>
      (/^[\udc80-\udcff]$/u.test(part) ? new Uint8Array([part.charCodeAt(0) - 0xdc00]) : part));
    const link = make("a", { href: URL.createObjectURL(new Blob(parts, { type: "text/csv;charset=utf-8" })), download: "accepted.csv" });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`${verdicts(ticks.size)} exported. Next: sanm relabel FOLDER --accepted accepted.csv --out labels.csv`);
  }

  function parse(text) {
    const table = [];
    let line = [], cell = "", quoted = false;
    for (let i = 0; i < text.length; i++) {
      const c = text[i];
      if (quoted) {
        if (c !== '"') cell += c;
        else if (text[i + 1] === '"') cell += text[++i];
        else quoted = false;
      } else if (c === '"') quoted = true;
      else if (c === ",") {
        line.push(cell);
        cell = "";
      } else if (c === "\n" || c === "\r") {
        if (c === "\r" && text[i + 1] === "\n") i++;
        if (cell || line.length) table.push([...line, cell]);
        line = [];
        cell = "";
      } else cell += c;
    }
    if (cell || line.length) table.push([...line, cell]);
    return table.map((cells) => cells.map(unescapeCell));
  }

  async function load(file) {
    const table = parse((await file.text()).replace(/^\ufeff/, "")), header = table.shift() || [];
    if (header.join() !== HEADER.join()) return say(`Nothing read: expected the header ${HEADER.join()}, got ${header.join().slice(0, 100) || "an empty file"}.`);
    const changes = [];
    for (const [name, , given, verdict, label] of table) {
      const row = rowOf.get(name);
      if (row === undefined || className(rows.given[row]) !== given || !Object.hasOwn(VERDICTS, verdict) || (verdict === "wrong") !== Boolean(label)) continue;
      changes.push([row, { verdict, label }]);
    }
    if (changes.length) apply(changes);
    const others = table.length - changes.length;
    return say(`${verdicts(changes.length)} read` + (others ? `, ${count(others)} rows are of another data set or damaged.` : "."));
  }

  // ---- words ----------------------------------------------------------------------------------------------------
  function say(text) {
    status = text;
    report();
  }

  function report() {
    const numbers = Object.fromEntries(Object.keys(VERDICTS).map((verdict) => [verdict, 0]));
    ticks.forEach((tick) => numbers[tick.verdict]++);
    const marks = Object.entries(numbers).filter(([, times]) => times).map(([verdict, times]) => `${count(times)} ${verdict}`).join(", ");
    $("status").textContent = `${count(shown.length)} of ${count(total)} shown · ${verdicts(ticks.size)}${marks ? ` (${marks})` : ""}` +
      (status ? " · " + status : "") + (stored ? "" : " · This browser does not keep verdicts: export them before you close the page.");
    $("undo").disabled = !undoing.length;
  }

  function verdictLine(s) {
    if (s.verdict) return s.verdict;
    const parts = [];
    if (typeof s.estimated_noise_rate === "number") {
      const range = s.interval ? ` (${percent(s.interval[0])} to ${percent(s.interval[1])})` : "";
      parts.push(`About ${percent(s.estimated_noise_rate)}${range} of the labels are wrong`);
    }
    parts.push(`${count(s.num_images ?? total)} images`);
    if (s.worst_pair) parts.push(`most often ${s.worst_pair.join(" → ")}`);
    return parts.join(" · ");
  }

  function filterPair(given, suggested) {
    $("given").value = String(given);
    $("suggested").value = String(suggested);
    select();
  }

  function summary() {
    const s = data.summary, place = $("summary");
    const title = s.title ? "Label audit: " + s.title : "Label audit";
    $("title").textContent = document.title = title;
    $("verdict").textContent = verdictLine(s);
    const table = (titles, lines) => make("table", {}, make("thead", {}, make("tr", {}, ...titles.map((text, i) => make("th", { textContent: text, className: i ? "number" : "" })))),
      make("tbody", {}, ...lines.map((cells) => make("tr", {}, ...cells.map((cell, i) => make("td", { className: i && i < 3 ? "number" : "" }, cell))))));
    for (const note of s.notes || []) place.append(make("p", { textContent: note }));
    if (s.classes && s.classes.length) {
      const lines = s.classes.map((c) => {
        const label = classes.indexOf(c.name), other = classes.indexOf(c.confused_with);
        const link = (text, action) => make("button", { type: "button", className: "link", textContent: text, onclick: action });
        return [
          label < 0 ? c.name : link(c.name, () => filterPair(label, "")), count(c.count), typeof c.wrong === "number" ? percent(c.wrong) : "–",
          label < 0 || other < 0 ? c.confused_with || "–" : link(c.confused_with, () => filterPair(label, other)),
        ];
      });
      const classTable = table(["class", "images", "wrong", "confused with"], lines);
      classTable.querySelector("th:last-child").className = "";
      place.append(make("section", {}, make("h2", { textContent: s.classes_of ? "Classes of " + s.classes_of : "Classes" }), classTable));
    }
    const pairs = new Map();
    for (let row = 0; row < total; row++) {
      if (isChange(row)) {
        const pair = rows.given[row] * classes.length + rows.suggested[row];
        pairs.set(pair, (pairs.get(pair) || 0) + 1);
      }
    }
    if (pairs.size) {
      const most = [...pairs].sort((a, b) => b[1] - a[1]).slice(0, 10).map(([pair, times]) => {
        const given = Math.floor(pair / classes.length), suggested = pair % classes.length;
        return make("li", {}, make("button", {
          type: "button", className: "link", textContent: `${classes[given]} → ${classes[suggested]}`, onclick: () => filterPair(given, suggested),
        }), ` (${count(times)})`);
      });
      place.append(make("section", {}, make("h2", { textContent: "Pairs, given → suggested" }), make("ol", {}, ...most)));
    }
    for (const finding of s.findings || []) {
      const entries = finding.items.slice(0, 200).map((names) => make("li", {}, ...names.flatMap((name, i) => {
        const link = rowOf.has(name) ? make("button", { type: "button", className: "link", textContent: name, onclick: () => find(name) }) : name;
        return i ? [", ", link] : [link];
      })));
      const number = finding.count ?? finding.items.length;
      place.append(make("details", {}, make("summary", { textContent: `${finding.title}: ${count(number)}` }), make("ol", {}, ...entries),
        number > entries.length ? make("p", { textContent: `${count(number - entries.length)} more are in audit.json.` }) : ""));
    }
    if (data.transition) {
      const top = make("tr", {}, make("th"), ...classes.map((name) => make("th", { textContent: name, title: name })));
      const lines = data.transition.map((probabilities, i) => make("tr", {}, make("th", { textContent: classes[i], title: classes[i] }),
        ...probabilities.map((p, j) => {
          const cell = make("td", { textContent: p < 0.005 ? "·" : p.toFixed(2), title: `${classes[i]} labeled ${classes[j]}: ${p.toFixed(3)}` });
          cell.style.background = `color-mix(in srgb, var(--bar) ${Math.round(100 * Math.min(1, p))}%, transparent)`;
          return cell;
        })));
      place.append(make("details", {}, make("summary", { textContent: "Estimated transition matrix" }),
        make("p", { textContent: "Row: the likely class; column: the given label; each row adds up to 1." }),
        make("div", { className: "matrix" }, make("table", {}, make("thead", {}, top), make("tbody", {}, ...lines)))));
    }
  }

  // ---- controls -------------------------------------------------------------------------------------------------
  function options(id, entries) {
    $(id).append(...entries.map(([value, text]) => make("option", { value, textContent: text })));
    $(id).onchange = select;
  }

  function setView(next) {
    if (next === view) return;
    view = next;
    list.className = next;
    $("as-sheet").setAttribute("aria-pressed", next === "sheet");
    $("as-table").setAttribute("aria-pressed", next === "table");
    live.forEach((element) => element.remove());
    live.clear();
    list.scrollTop = 0;
    refresh();
    if (current >= 0) go(current);
  }

  const across = () => (view === "table" ? 1 : geometry().across);
  const page = () => Math.max(1, Math.floor(geometry().room / geometry().line)) * across();
  const KEYS = {
    j: () => step(1), k: () => step(-1), ArrowDown: () => step(across()), ArrowUp: () => step(-across()), ArrowRight: () => step(1),
    ArrowLeft: () => step(-1), PageDown: () => step(page()), PageUp: () => step(-page()), Home: () => step(-total), End: () => step(total),
    c: () => current >= 0 && ticks.has(current) && judge(current, null), n: choose, u: undo,
    "/": () => $("search").focus(), v: () => setView(view === "table" ? "sheet" : "table"),
  };
  for (const [verdict, key] of Object.entries(VERDICTS)) {
    KEYS[key] = () => {
      const at = shown.indexOf(current);
      if (current >= 0 && judge(current, verdict) && shown[at] === current) step(1);
    };
  }

  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape" && typing) return list.focus({ preventScroll: true });
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return undefined;
    if (event.target.closest("summary, aside") && /^(Arrow|Page|Home|End)/.test(event.key)) return undefined;
    event.preventDefault();
    KEYS[event.key]();
    return undefined;
  });

  options("split", [["", "all"], ...data.splits.map((name, i) => [String(i), name])]);
  $("split-label").hidden = data.splits.length < 2;
  options("given", [["", "any"], ...classes.map((name, i) => [String(i), name])]);
  options("suggested", [["", "any"], ...classes.map((name, i) => [String(i), name])]);
  options("show", [["", "all"], ["differs", "suggested differs"], ["none", "no verdict"], ["any", "any verdict"], ...Object.keys(VERDICTS).map((verdict) => [verdict, verdict])]);
  options("sort", COLUMNS.filter(([, , by]) => by).flatMap(([key, title]) => [[key, title + " ▲"], [key + " down", title + " ▼"]]));
  $("sort").onchange = () => {
    const [key, down] = $("sort").value.split(" ");
    sorting = { key, down: Boolean(down) };
    select();
  };
  $("search").oninput = select;
  $("bar").onsubmit = (event) => event.preventDefault();
  $("as-sheet").onclick = () => setView("sheet");
  $("as-table").onclick = () => setView("table");
  $("export").onclick = save;
  $("undo").onclick = undo;
  $("import").onclick = () => $("file").click();
  $("file").onchange = async () => {
    if ($("file").files.length) await load($("file").files[0]);
    $("file").value = "";
  };
  let asked = 0;
  list.addEventListener("scroll", () => { asked = asked || requestAnimationFrame(() => { asked = 0; render(); }); });
  new ResizeObserver(() => render()).observe(list);
  window.addEventListener("beforeprint", () => {  // the worst of what is shown, on paper
    for (const row of shown.slice(0, 200)) {
      if (!live.has(row)) live.set(row, item(row));
      paint(row, live.get(row));
      if (live.get(row).box.start) live.get(row).box.start();
      space.append(live.get(row));
    }
  });
  window.addEventListener("afterprint", render);

  list.className = view;
  restore();
  summary();
  select();
  list.focus({ preventScroll: true });
  requestAnimationFrame(() => setTimeout(() => performance.mark("report-ready")));
})();
