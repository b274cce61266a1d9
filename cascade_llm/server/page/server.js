// What the page asks of its server: with the key, where one is needed.
// @ts-check

const KEY = "cascade-llm.key";
let key = sessionStorage.getItem(KEY) ?? "";

/** The key that requests are sent with; forgotten with the tab. @param {string} given */
export function setKey(given) {
  key = given.trim();
  sessionStorage.setItem(KEY, key);
}

/** @returns {string} */
export const currentKey = () => key;

/**
 * Ask, and throw what the server says where it refuses.
 * @param {string} path
 * @param {{body?: object, signal?: AbortSignal}} [options]
 * @returns {Promise<Response>}
 */
export async function ask(path, { body, signal } = {}) {
  /** @type {Record<string, string>} */
  const headers = body ? { "content-type": "application/json" } : {};
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, {
    method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), cache: "no-store",
  });
  if (response.ok) return response;
  /** @type {{error?: {message?: string}} | null} */
  const told = await response.json().catch(() => null);
  const error = new Error(told?.error?.message ?? `the server answered ${response.status}`);
  error.name = response.status === 401 ? "NeedsKey" : "Refused";
  throw error;
}

/**
 * The data of server-sent events, as they come.
 * @param {Response} response
 * @returns {AsyncGenerator<string>}
 */
export async function* eventData(response) {
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop() ?? "";
      for (const part of parts) {
        for (const line of part.split("\n")) if (line.startsWith("data: ")) yield line.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
