// Runs the chat page under node: a document of stand-ins, the real script, a real server.
const fs = require("node:fs");

const [, , script, url, action] = process.argv;

class Element {
  constructor() {
    Object.assign(this, { children: [], handlers: {}, value: "", checked: true, className: "" });
    this.text = "";
    this.style = { setProperty: (name, value) => (this[name] = value) };
  }
  get textContent() {
    return this.text + this.children.map((child) => child.textContent ?? child).join("");
  }
  set textContent(text) {
    this.text = String(text);
    this.children = [];
  }
  append(...added) {
    this.children.push(...added);
  }
  replaceChildren(...added) {
    this.children = added;
  }
  scrollIntoView() {}
  addEventListener(name, handler) {
    this.handlers[name] = handler;
  }
}

const known = {};
global.document = {
  getElementById: (id) => (known[id] ??= new Element()),
  createElement: () => new Element(),
};
const fetched = global.fetch;
global.fetch = (path, options) => fetched(`${url}/${path}`, options);
known.limit = Object.assign(new Element(), { value: "12" });
known.temperature = Object.assign(new Element(), { value: "0" });
known.speculate = Object.assign(new Element(), { checked: action !== "plain" });
(0, eval)(fs.readFileSync(script, "utf8"));
known.text.value = "hello";
known.form.handlers.submit({ preventDefault() {} });

async function finished() {
  while (!known.send.disabled) await new Promise((resolve) => setTimeout(resolve, 5));
  while (known.send.disabled) await new Promise((resolve) => setTimeout(resolve, 5));
}

finished().then(async () => {
  const turns = known.turns.children.map((turn) => ({
    kind: turn.className,
    text: turn.textContent,
    marks: turn.children.map((child) => [child.className, child["--place"] ?? null]),
  }));
  console.log(JSON.stringify({ turns, length: known.length?.text, rounds: known.rounds?.text }));
});
