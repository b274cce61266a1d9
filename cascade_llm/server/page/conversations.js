// Conversations, branches of each other, kept in this browser.
// @ts-check

/**
 * @typedef {{role: "user" | "assistant", content: string, note?: string, wrong?: string}} Message
 * @typedef {{id: string, parent: string | null, system: string, messages: Message[], question?: string}} Conversation
 *   `question` names the last one, where it was asked for several answers at once.
 */

const PLACE = "cascade-llm.conversations";
const MOST_KEPT = 100;
const DEFAULT_SYSTEM = "You are a helpful assistant.";

export class Conversations {
  constructor() {
    /** @type {Conversation[]} */
    this.all = read();
    /** @type {Conversation} */
    this.current = this.all.at(-1) ?? this.begin();
  }

  /** A new conversation, with the system prompt of the one before. */
  begin() {
    return this.#add({ id: crypto.randomUUID(), parent: null, system: this.current?.system ?? DEFAULT_SYSTEM, messages: [] });
  }

  /** A branch with the first messages of a conversation. @param {Conversation} from @param {number} numMessages */
  branch(from, numMessages) {
    const messages = from.messages.slice(0, numMessages).map((message) => ({ ...message }));
    return this.#add({ id: crypto.randomUUID(), parent: from.id, system: from.system, messages });
  }

  /** Forget one; its branches hang on its parent. @param {Conversation} gone */
  remove(gone) {
    for (const other of this.all) if (other.parent === gone.id) other.parent = gone.parent;
    this.all = this.all.filter((other) => other !== gone);
    this.current = this.all.find((other) => other.id === gone.parent) ?? this.all.at(-1) ?? this.begin();
    this.save();
  }

  /** @param {string | null} id */
  childrenOf(id) {
    const ids = new Set(this.all.map((one) => one.id));
    return this.all.filter((one) => (one.parent !== null && ids.has(one.parent) ? one.parent : null) === id);
  }

  /** A conversation, and those that were asked the same question with it and have not gone on. @param {Conversation} one */
  beside(one) {
    const { question, messages: { length } } = one;
    return question ? this.all.filter((other) => other.question === question && other.messages.length === length) : [one];
  }

  save() {
    try {
      localStorage.setItem(PLACE, JSON.stringify(this.all.slice(-MOST_KEPT)));
    } catch {
      // full, or not allowed: they last as long as the tab
    }
  }

  /** @param {Conversation} conversation */
  #add(conversation) {
    this.all.push(conversation);
    this.save();
    return conversation;
  }
}

/** @param {Conversation} conversation */
export function title(conversation) {
  const said = conversation.messages.findLast((message) => message.role === "user");
  return said?.content.trim().slice(0, 60) || "Empty conversation";
}

/** @param {Partial<Conversation> | null} one */
const isConversation = (one) => typeof one?.id === "string" && Array.isArray(one.messages);

/** @returns {Conversation[]} */
function read() {
  try {
    /** @type {unknown} */
    const kept = JSON.parse(localStorage.getItem(PLACE) ?? "[]");
    return Array.isArray(kept) ? kept.filter(isConversation) : [];
  } catch {
    return [];
  }
}
