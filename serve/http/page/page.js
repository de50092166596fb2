// A chat with the served model: streams answers and colours each token by who said it first.
"use strict";

// What each token of a chunk was: its place in its round's draft, "bonus", or null without a draft.
function marks(details) {
  const rounds = details.rounds.flatMap(([, accepted]) => [...Array(accepted).keys(), "bonus"]);
  const count = details.tokens.length;
  // A cut at the answer's end takes tokens of the last round; tokens before any round had no draft.
  const plain = Math.max(0, count - rounds.length);
  return [...Array(plain).fill(null), ...rounds].slice(0, count);
}

// Splits what arrives into the events that are whole and the rest.
function split(buffered) {
  const parts = buffered.split("\n\n");
  const rest = parts.pop();
  return [parts.filter((part) => part.startsWith("data: ")).map((part) => part.slice(6)), rest];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const [whole, rest] = split(buffered + value);
    buffered = rest;
    for (const event of whole) {
      if (event === "[DONE]") return;
      yield JSON.parse(event);
    }
  }
}

class Speed {
  constructor() {
    this.tokens = this.rounds = this.accepted = 0;
    this.first = this.last = null;
  }

  add(details, now) {
    this.tokens += details.tokens.length;
    this.rounds += details.rounds.length;
    for (const [, accepted] of details.rounds) this.accepted += accepted;
    if (this.first === null) {
      this.first = now;
      this.before = details.tokens.length;
    }
    this.last = now;
  }

  // Tokens that a round brings, the bonus token included.
  get length() {
    return this.rounds ? 1 + this.accepted / this.rounds : null;
  }

  // Tokens per second after the first chunk, which also waited for the prompt.
  get perSecond() {
    const seconds = (this.last - this.first) / 1000;
    return seconds > 0 ? (this.tokens - this.before) / seconds : null;
  }
}

function span(text, mark) {
  const made = document.createElement("span");
  made.textContent = text;
  if (mark === "bonus") {
    made.className = "bonus";
    made.title = "bonus token: the target's own";
  } else if (mark !== null) {
    made.className = "drafted";
    made.style.setProperty("--place", mark);
    made.title = `drafted, place ${mark + 1}`;
  }
  return made;
}

function start() {
  const find = (id) => document.getElementById(id);
  const turns = find("turns");
  let messages = [];
  let running = null;

  const headers = () => {
    const key = find("key").value.trim();
    return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
  };

  function turn(role, text) {
    const made = document.createElement("div");
    made.className = `turn ${role}`;
    made.textContent = text;
    turns.append(made);
    made.scrollIntoView({ block: "end" });
    return made;
  }

  function show(speed) {
    const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits));
    find("length").textContent = fixed(speed.length, 2);
    find("speed").textContent = fixed(speed.perSecond, 1);
    find("count").textContent = speed.tokens;
    find("rounds").textContent = speed.rounds;
  }

  async function name() {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.ok) find("model").textContent = (await response.json()).data[0].id;
  }

  async function ask(conversation, signal) {
    const body = {
      messages: conversation,
      stream: true,
      dspark_details: true,
      speculate: find("speculate").checked,
      temperature: Number(find("temperature").value),
      max_tokens: Number(find("limit").value),
    };
    const asked = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
    const response = await fetch("v1/chat/completions", asked);
    if (!response.ok) throw new Error((await response.json()).error.message);
    return response;
  }

  async function answer(conversation, signal) {
    const response = await ask(conversation, signal);
    const made = turn("assistant", "");
    const speed = new Speed();
    let text = "";
    try {
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        if (!event.dspark) continue;
        text += event.choices[0].delta.content;
        const kinds = marks(event.dspark);
        event.dspark.tokens.forEach(([, piece], i) => made.append(span(piece, kinds[i])));
        speed.add(event.dspark, performance.now());
        show(speed);
        made.scrollIntoView({ block: "end" });
      }
    } finally {
      conversation.push({ role: "assistant", content: text });
      const note = document.createElement("div");
      note.className = "note";
      const length = speed.length === null ? "plain" : `acceptance length ${speed.length.toFixed(2)}`;
      const rate = speed.perSecond === null ? "" : `, ${speed.perSecond.toFixed(1)} tokens/s`;
      note.textContent = `${speed.tokens} tokens, ${length}${rate}`;
      made.append(note);
    }
  }

  async function send() {
    const text = find("text").value;
    if (running || !text.trim()) return;
    find("text").value = "";
    // Clearing begins another conversation; this answer still belongs to this one.
    const conversation = messages;
    const before = conversation.length;
    conversation.push({ role: "user", content: text });
    turn("user", text);
    running = new AbortController();
    find("send").disabled = !(find("stop").disabled = false);
    try {
      await answer(conversation, running.signal);
      name();
    } catch (error) {
      if (error.name !== "AbortError") turn("error", error.message);
      // A question that got no answer would make the next one unlike any conversation.
      if (conversation.length === before + 1) conversation.pop();
    }
    running = null;
    find("send").disabled = !(find("stop").disabled = true);
  }

  find("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  find("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  find("stop").addEventListener("click", () => running?.abort());
  find("clear").addEventListener("click", () => {
    running?.abort();
    messages = [];
    turns.replaceChildren();
  });
  find("legend").append("drafted, by place:");
  for (let place = 0; place < 8; place += 1) find("legend").append(span(String(place + 1), place));
  find("legend").append(span("bonus", "bonus"), "no mark: no draft");
  name();
}

if (typeof document !== "undefined") start();
if (typeof module !== "undefined") module.exports = { marks, split, events, Speed };
