"use strict";
// Everything shown is set as text, never as markup.
const $ = (id) => document.getElementById(id);
const make = (tag, text = "", kind = "") => {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
const TABS = ["tokens", "next", "attention", "layers", "law", "chat", "rank"];
const TEXT = ["tokens", "next", "attention", "layers"];  // the views of the text
let tab = "tokens", asked = 0, models = [], inside = null, talk = [], stopping = null, typed = 0;

async function post(path, body, signal) {
  const answer = await fetch(path, {
    method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body), signal});
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({error: {message: answer.statusText}}));
    throw Object.assign(new Error(told.error.message), {code: told.error.code});
  }
  return answer;
}

function fault(error) {
  $("fault").textContent = error ? error.message : "";
  $("fault").hidden = !error;
}

function choose(name, focus) {
  tab = name;
  for (const one of TABS) {
    $("tab-" + one).setAttribute("aria-selected", one === name);
    $("tab-" + one).tabIndex = one === name ? 0 : -1;
    $(one).hidden = one !== name;
  }
  if (focus) $("tab-" + name).focus();
  $("read").hidden = $("cut").hidden = !TEXT.includes(name);
  history.replaceState(null, "", "#" + name);
  look();
}

async function look() {
  clearTimeout(typed);
  if (tab === "rank") return keeps();
  if (tab === "chat") return;
  const mine = ++asked, view = tab;
  $(view).setAttribute("aria-busy", true);
  try {
    const found = await (await post("look/" + view, {model: $("model").value, text: $("text").value})).json();
    if (mine !== asked) return;
    fault();
    $("cut").textContent = found.cut ? `This view reads ${found.cut}.` : "";
    ({tokens: showTokens, next: showNext, attention: showAttention, layers: showLayers, law: showLaw})[view](found);
  } catch (error) {
    if (mine === asked) fault(error);
  }
  if (mine === asked) for (const one of TABS) $(one).removeAttribute("aria-busy");
}

function showTokens(found) {
  $("pieces").replaceChildren(...found.pieces.flatMap((piece, n) =>
    [make("span", piece.text, "c" + (n % 4)), make("small", piece.id)]));
  $("counted").textContent = `${found.bytes} bytes, ${found.pieces.length} tokens of a vocabulary of ${found.V}`;
  $("merges").replaceChildren(...found.merges.map(({word, steps}) => {
    const box = make("details");
    box.append(make("summary", `how “${word}” was built: ${steps.length - 1} merges`),
      ...steps.map((step) => make("div", step.join(" | "))));
    return box;
  }));
}

function showNext(found) {
  $("following").replaceChildren(...found.next.map(({name, likeliest}) => {
    const box = make("section"), list = make("ol");
    list.append(...likeliest.map((one) => {
      const row = make("li"), times = one.count ? `, ${one.count.toLocaleString("en")} times` : "";
      const button = make("button", `${one.text}  ${(100 * one.p).toFixed(1)}%${times}`);
      button.style.backgroundImage = `linear-gradient(90deg, #56b4e966 ${100 * one.p}%, transparent 0)`;
      button.onclick = () => {
        $("text").value += one.adds;
        look();
      };
      button.disabled = !one.adds;  // part of a character, or the end
      row.append(button);
      return row;
    }));
    box.append(make("h3", name), list);
    return box;
  }));
}

const shade = (p) => `rgb(0 114 178 / ${p})`;

function showAttention(found) {
  const fresh = !inside || inside.words.join("\0") !== found.words.join("\0")
    || inside.weights.length !== found.weights.length;
  inside = found;
  const options = (count) => Array.from({length: count}, (_, n) => new Option(n + 1, n));
  if (fresh || !$("layer").length) {
    $("layer").replaceChildren(...options(found.weights.length));
    $("head").replaceChildren(...options(found.weights[0].length));
    [$("layer").value, $("head").value] = found.pair;
  }
  heat();
  worked();
}

function heat() {
  const layer = $("layer").value, head = $("head").value, habits = inside.habits;
  const weights = inside.weights[layer][head], rows = [make("tr")];
  const of = (name) => habits[name][layer][head].toFixed(2);
  $("habits").hidden = !habits.nats;
  if (habits.nats) $("habits").textContent = `On random pieces said twice this head gives the token before ${of("previous")}, the first token `
    + `${of("first")}, and in the repeat ${of("induction")} to what followed the same token (induction).`;
  rows[0].append(make("th"), ...inside.words.map((word) => make("th", word, "top")));
  weights.forEach((row, t) => {
    const line = make("tr");
    line.append(make("th", inside.words[t]));
    row.slice(0, t + 1).forEach((p, s) => {
      const cell = make("td");
      cell.style.background = shade(p);
      cell.tabIndex = s === t ? 0 : -1;
      cell.dataset.at = `${t},${s}`;
      cell.setAttribute("aria-label", `${inside.words[t]} reads ${inside.words[s]}: ${p.toFixed(3)}`);
      cell.onmouseenter = cell.onfocus = () => {
        $("weight").textContent = `“${inside.words[t]}” gives “${inside.words[s]}” a weight of ${p.toFixed(3)}`;
      };
      cell.onclick = () => pick(t, s);
      cell.onkeydown = (event) => {
        const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
        if (step) {
          event.preventDefault();
          document.querySelector(`#heat td[data-at="${t + step[0]},${s + step[1]}"]`)?.focus();
        } else if (event.key === "Enter") pick(t, s);
      };
      line.append(cell);
    });
    rows.push(line);
  });
  $("heat").replaceChildren(...rows);
}

async function pick(t, s) {
  const mine = ++asked;
  try {
    const pair = [Number($("layer").value), Number($("head").value), t, s];
    const found = await (await post("look/attention", {model: $("model").value, text: $("text").value, pair})).json();
    if (mine !== asked) return;  // a later choice is on its way
    inside = found;
    worked();
    fault();
  } catch (error) {
    fault(error);
  }
}

function worked() {
  const one = inside.worked, [layer, head, t, s] = inside.pair, lines = [];
  for (const [name, values] of [["query", one.q], ["key", one.k], ["product", one.q.map((x, n) => x * one.k[n])], ["value", one.v]]) {
    const row = make("tr");
    row.append(make("th", name), ...values.slice(0, 8).map((x) => make("td", x.toFixed(2))));
    lines.push(row);
  }
  $("sum").textContent = `layer ${layer + 1}, head ${head + 1}: “${inside.words[t]}” reads “${inside.words[s]}”: `
    + `q·k = ${one.dot.toFixed(3)}, over √${one.q.length} ${one.score.toFixed(3)}, exp ${Math.exp(one.score).toFixed(3)} `
    + `of ${one.total.toFixed(3)}: a weight of ${one.weight.toFixed(3)}`;
  $("worked").replaceChildren(...lines);
}

function showLayers(found) {
  const head = make("tr");
  const depth = (l) => l ? "layer " + l : "embedding";
  head.append(make("th", "token"), ...found.agree.map((agree, l) =>
    make("th", `${depth(l)}, ${Math.round(100 * agree)}% agree`)), make("th", "first says its answer, and stays"));
  $("depths").replaceChildren(head, ...found.words.map((word, t) => {
    const row = make("tr");
    row.append(make("th", word), ...found.names.map((names, l) => {
      const cell = make("td"), p = found.p[l][t][0];
      cell.append(make(found.rank[l][t] === 0 ? "b" : "span", `${names[t][0]} ${Math.round(100 * p)}%`));
      cell.style.background = shade(p / 2);
      cell.title = names[t].map((name, n) => `${name} ${(100 * found.p[l][t][n]).toFixed(1)}%`).join("  ");
      return cell;
    }), make("td", depth(found.settled[t])));
    return row;
  }));
}

function showLaw(found) {
  $("none").hidden = found.figures.length > 0;
  $("figures").replaceChildren(...found.figures.map((one) => {
    const image = make("img");
    image.alt = one.title;
    image.src = "data:image/svg+xml," + encodeURIComponent(one.svg);
    return image;
  }));
}

async function answers(event) {
  event.preventDefault();
  const prompt = $("prompt").value.trim();
  if (!prompt) return;
  $("keep").disabled = true;
  $("kept").textContent = "answering ...";
  try {
    const found = await (await post("v1/chat/completions", {model: $("model").value, n: Number($("count").value),
      messages: [{role: "user", content: prompt}], temperature: 1})).json();
    $("ranked").dataset.prompt = prompt;
    const said = [...new Set(found.choices.map((choice) => choice.message.content.trim()).filter(Boolean))];
    $("ranked").replaceChildren(...said.map((one) => {
      const row = make("li"), text = make("span", one, "turn");
      const up = make("button", "up"), down = make("button", "down");
      up.onclick = () => { row.previousElementSibling?.before(row); up.focus(); };
      down.onclick = () => { row.nextElementSibling?.after(row); down.focus(); };
      row.append(up, " ", down, " ", text);
      return row;
    }));
    $("keep").disabled = said.length < 2;
    $("kept").textContent = said.length < 2 ? "the answers are all the same; ask again" : "";
    fault();
  } catch (error) {
    $("kept").textContent = "";
    fault(error);
  }
}

async function keeps() {
  try {
    const {keeps} = await (await post("look/rank", {model: $("model").value, text: ""})).json();
    $("kept").textContent = keeps ? `rankings go to ${keeps}`
      : "this server keeps no rankings; start it with --rankings FILE";
  } catch (error) {
    fault(error);
  }
}

async function keep() {
  const responses = [...$("ranked").querySelectorAll("span")].map((one) => one.textContent);
  try {
    const found = await (await post("look/rank", {model: $("model").value, text: $("ranked").dataset.prompt, responses})).json();
    $("keep").disabled = true;
    $("kept").textContent = `kept in ${found.kept}`;
    fault();
  } catch (error) {
    fault(error);
  }
}

async function answer(name, box, signal) {
  const tuned = models.find((m) => m.id === name).kind === "chat";
  const messages = talk.map((turn) => turn.by ? {role: "assistant", content: turn.said[name] ?? ""}
    : {role: "user", content: turn.said});
  const system = tuned && $("system").value ? [{role: "system", content: $("system").value}] : [];
  const ask = () => post("v1/chat/completions", {model: name, messages: [...system, ...messages],
    stream: true, temperature: Number($("temperature").value)}, signal).catch((error) => {
    if (error.code !== "context_length_exceeded" || messages.length < 3) throw error;
    messages.splice(0, 2);  // the oldest turn is forgotten
    return ask();
  });
  const stream = (await ask()).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const {done, value} = await stream.read();
    if (done) return;
    const lines = (held + value).split("\n\n");
    held = lines.pop();
    for (const line of lines.filter((l) => l !== "data: [DONE]")) {
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      box.textContent += event.choices[0]?.delta.content ?? "";
    }
  }
}

async function send(event) {
  event.preventDefault();
  const said = $("said").value.trim();
  if (!said || stopping) return;
  $("said").value = "";
  const mine = talk;  // a new talk may begin while this answer comes
  mine.push({said});
  const names = [...new Set([$("model").value, $("beside").value].filter(Boolean))];
  const turn = {by: true, said: {}};
  const boxes = names.map((name) => {
    const box = column(name);
    box.append(make("div", said, "turn user"), make("div", "", "turn"));
    return box.lastChild;
  });
  const stop = stopping = new AbortController();
  $("stop").disabled = false;
  const ended = await Promise.allSettled(names.map((name, n) => answer(name, boxes[n], stop.signal)));
  names.forEach((name, n) => { turn.said[name] = boxes[n].textContent; });
  mine.push(turn);
  if (stopping !== stop) return;
  stopping = null;
  $("stop").disabled = true;
  const failed = ended.find((one) => one.status === "rejected" && one.reason.name !== "AbortError");
  fault(failed?.reason);
}

function column(name) {
  let box = [...$("talks").children].find((one) => one.dataset.name === name);
  if (!box) {
    box = make("div", "", "talk");
    box.dataset.name = name;
    box.append(make("h2", name));
    $("talks").append(box);
  }
  return box;
}

$("tabs").onkeydown = (event) => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (step) choose(TABS[(TABS.indexOf(tab) + step + TABS.length) % TABS.length], true);
};
TABS.forEach((name) => { $("tab-" + name).onclick = () => choose(name); });
$("text").oninput = () => {
  clearTimeout(typed);
  $(tab).setAttribute("aria-busy", true);  // what it shows is of another text from here on
  typed = setTimeout(look, tab === "tokens" ? 0 : 250);
};
$("model").onchange = look;
$("layer").onchange = $("head").onchange = () => {
  const t = inside.words.length - 1;
  heat();
  pick(t, t);
};
$("answer").onsubmit = answers;
$("keep").onclick = keep;
$("ask").onsubmit = send;
$("stop").onclick = () => stopping?.abort();
$("fresh").onclick = () => {
  stopping?.abort();
  stopping = null;
  talk = [];
  $("stop").disabled = true;
  $("talks").replaceChildren();
  fault();
};

fetch("v1/models").then((answer) => answer.json()).then((found) => {
  models = found.data;
  $("model").replaceChildren(...models.map((m) => new Option(`${m.id} (${m.kind})`, m.id)));
  $("beside").replaceChildren(new Option("nobody", ""), ...models.map((m) => new Option(m.id, m.id)));
  const named = () => choose(TABS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "tokens");
  window.onhashchange = named;
  named();
  post("look/next", {model: $("model").value, text: "the"}).catch(() => {});  // counts beforehand
}).catch(fault);
