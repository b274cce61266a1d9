// The chat: questions, answers as they come, and branches.
// @ts-check
import { Conversations, title } from "./conversations.js";
import { at, element } from "./elements.js";
import { MarkdownView } from "./markdown.js";
import { ask, eventData } from "./server.js";

/** @typedef {import("./conversations.js").Conversation} Conversation */
/** @typedef {import("./conversations.js").Message} Message */
/** @typedef {{completion_tokens: number, prompt_tokens: number, prompt_tokens_details?: {cached_tokens: number}}} Usage */
/** @typedef {{choices: {delta?: {content?: string}}[], usage?: Usage, error?: {message: string}}} Piece */

const list = at("conversation-list", HTMLUListElement), log = at("messages", HTMLDivElement);
const question = at("question", HTMLTextAreaElement), system = at("system", HTMLTextAreaElement);
const send = at("send", HTMLButtonElement), stop = at("stop", HTMLButtonElement);
const answers = at("answers", HTMLSelectElement);
const temperature = at("temperature", HTMLInputElement), maxTokens = at("max-tokens", HTMLInputElement);
const NEAR_END_PX = 60;

export class Chat {
  /** @param {(text: string) => void} say tells the user, and screen readers */
  constructor(say) {
    this.say = say;
    this.conversations = new Conversations();
    /** Answers under way. @type {Map<Conversation, AbortController>} */
    this.running = new Map();
    /** The answers that are shown. @type {Map<Message, MarkdownView>} */
    this.shown = new Map();
    /** Of these, what has grown since the last frame. @type {Set<Message>} */
    this.grown = new Set();
    at("ask", HTMLFormElement).addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    stop.addEventListener("click", () => this.stop());
    at("new-conversation", HTMLButtonElement).addEventListener("click", () => this.show(this.conversations.begin()));
    at("delete-conversation", HTMLButtonElement).addEventListener("click", () => this.forget());
    system.addEventListener("input", () => { this.conversations.current.system = system.value; this.conversations.save(); });
    this.show(this.conversations.current);
  }

  /** @param {Conversation} conversation */
  show(conversation) {
    this.conversations.current = conversation;
    system.value = conversation.system;
    this.drawList();
    this.drawMessages();
    log.scrollTop = log.scrollHeight;
  }

  forget() {
    const gone = this.conversations.current;
    this.running.get(gone)?.abort();
    this.conversations.remove(gone);
    this.show(this.conversations.current);
  }

  /** Stop every answer that is under way, in whatever conversation. */
  stop() {
    for (const controller of this.running.values()) controller.abort();
  }

  send() {
    const text = question.value.trim(), conversation = this.conversations.current;
    if (!text || this.running.has(conversation)) return;
    question.value = "";
    const numAnswers = Number(answers.value), before = conversation.messages.length;
    const asked = [conversation];
    for (let i = 1; i < numAnswers; i += 1) asked.push(this.conversations.branch(conversation, before));
    const together = numAnswers > 1 ? crypto.randomUUID() : undefined;
    for (const one of asked) {
      one.question = together;
      one.messages.push({ role: "user", content: text });
      this.answer(one);
    }
    this.show(conversation);
  }

  /** Let the model answer the last message. @param {Conversation} conversation */
  async answer(conversation) {
    /** @type {Message} */
    const message = { role: "assistant", content: "" };
    const said = conversation.messages.map(({ role, content }) => ({ role, content }));
    const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }, ...said] : said;
    const controller = new AbortController();
    conversation.messages.push(message);
    this.running.set(conversation, controller);
    try {
      const body = {
        messages, stream: true, stream_options: { include_usage: true },
        temperature: Number(temperature.value), max_tokens: Number(maxTokens.value),
      };
      await this.read(await ask("/v1/chat/completions", { body, signal: controller.signal }), message);
    } catch (error) {
      if (controller.signal.aborted) message.note = "stopped";
      else message.wrong = error instanceof Error ? error.message : String(error);
    }
    this.running.delete(conversation);
    this.conversations.save();
    this.drawList();
    const isCurrent = conversation === this.conversations.current;
    if (isCurrent || this.conversations.beside(this.conversations.current).includes(conversation)) this.drawMessages();
    if (isCurrent) {
      this.say(message.wrong ? `Error: ${message.wrong}` : `Answer ${message.note === "stopped" ? "stopped" : "complete"}.`);
    }
  }

  /** @param {Response} response @param {Message} message */
  async read(response, message) {
    let firstMs = 0, lastMs = 0;
    for await (const data of eventData(response)) {
      if (data === "[DONE]") return;
      /** @type {Piece} */
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      const text = piece.choices[0]?.delta?.content;
      if (text) {
        lastMs = performance.now();
        firstMs ||= lastMs;
        this.grow(message, text);
      }
      if (piece.usage) message.note = note(piece.usage, lastMs - firstMs);
    }
    throw new Error("the answer broke off");
  }

  /** @param {Message} message @param {string} text */
  grow(message, text) {
    message.content += text;
    if (!this.grown.size) requestAnimationFrame(() => this.drawGrown());
    this.grown.add(message);
  }

  drawGrown() {
    const wasAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
    for (const message of this.grown) this.shown.get(message)?.show(message.content);
    this.grown.clear();
    if (wasAtEnd) log.scrollTop = log.scrollHeight;
  }

  drawList() {
    const hadFocus = list.contains(document.activeElement);
    const draw = (/** @type {string | null} */ parent) => this.conversations.childrenOf(parent).map((conversation, i) => {
      const name = parent === null ? title(conversation) : `${i + 1}: ${title(conversation)}`;
      const item = element("li"), button = element("button", this.running.has(conversation) ? "busy" : "", name);
      button.setAttribute("type", "button");
      button.setAttribute("aria-current", String(conversation === this.conversations.current));
      button.addEventListener("click", () => this.show(conversation));
      item.append(button);
      const inner = draw(conversation.id);
      if (inner.length) {
        const branches = element("ul");
        branches.append(...inner);
        item.append(branches);
      }
      return item;
    });
    list.replaceChildren(...draw(null));
    const shown = list.querySelector("[aria-current=true]");
    if (hadFocus && shown instanceof HTMLElement) shown.focus();
    stop.disabled = !this.running.size;
    send.disabled = this.running.has(this.conversations.current);
    log.setAttribute("aria-busy", String(this.running.has(this.conversations.current)));
  }

  drawMessages() {
    this.shown.clear();
    const hadFocus = log !== document.activeElement && log.contains(document.activeElement);
    const { current } = this.conversations, beside = this.conversations.beside(current);
    const drawn = current.messages.map((message, place) => (
      beside.length > 1 && place === current.messages.length - 1 ? this.drawBeside(beside, place) : this.drawMessage(current, message, place)
    ));
    const hint = "Several answers to one question, or branches of one conversation, share their beginning: the server reads it once for all of them. See it under “What the running sequences share”.";
    log.replaceChildren(...(drawn.length ? drawn : [element("p", "", hint)]));
    if (hadFocus) log.focus();
  }

  /** Several answers to one question. @param {Conversation[]} conversations @param {number} place */
  drawBeside(conversations, place) {
    const columns = element("div", "beside");
    columns.setAttribute("role", "group");
    columns.setAttribute("aria-label", "Answers to the same question");
    columns.tabIndex = 0;
    columns.append(...conversations.map((one) => {
      const article = this.drawMessage(one, one.messages[place], place);
      article.setAttribute("aria-current", String(one === this.conversations.current));
      return article;
    }));
    return columns;
  }

  /** @param {Conversation} conversation @param {Message} message @param {number} place */
  drawMessage(conversation, message, place) {
    const article = element("article", `message ${message.role}`), who = message.role === "user" ? "You" : "Answer";
    const text = element("div", "text");
    if (message.role === "user") text.append(message.content);
    else {
      const view = new MarkdownView(text);
      view.show(message.content);
      this.shown.set(message, view);
    }
    const footer = element("footer");
    if (message.note) footer.append(element("span", "note", message.note));
    if (message.wrong) footer.append(element("span", "wrong", message.wrong));
    const offer = (/** @type {string} */ name, /** @type {() => void} */ act) => {
      const button = element("button", "", name);
      button.setAttribute("type", "button");
      button.addEventListener("click", act);
      footer.append(button);
    };
    const isUnderWay = this.running.has(conversation) && place === conversation.messages.length - 1;
    if (message.role === "user") {
      offer("Edit in a branch", () => {
        this.show(this.conversations.branch(conversation, place));
        question.value = message.content;
        question.focus();
      });
    } else if (!isUnderWay) {
      offer("Branch here", () => { this.show(this.conversations.branch(conversation, place + 1)); question.focus(); });
      offer("Retry in a branch", () => {
        const branch = this.conversations.branch(conversation, place);
        this.answer(branch);
        this.show(branch);
      });
      if (conversation !== this.conversations.current) offer("Go on with this", () => { this.show(conversation); question.focus(); });
    }
    article.append(element("h3", "", who), text, footer);
    return article;
  }
}

/** @param {Usage} usage @param {number} ms between the first piece and the last */
function note(usage, ms) {
  const generated = usage.completion_tokens, cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const rate = generated > 1 && ms > 0 ? `, ${((1000 * (generated - 1)) / ms).toFixed(1)} tokens/s` : "";
  return `${generated} tokens${rate}; ${cached} of ${usage.prompt_tokens} prompt tokens cached`;
}
