// Puts the page together.
// @ts-check
import { Chat } from "./chat.js";
import { at } from "./elements.js";
import { ask, currentKey, setKey } from "./server.js";
import { SharingView } from "./sharing.js";

const status = at("status", HTMLElement), model = at("model", HTMLElement), key = at("key", HTMLInputElement);
const say = (/** @type {string} */ text) => { status.textContent = text; };
const sharing = new SharingView();

async function nameModel() {
  try {
    /** @type {{data: {id: string}[]}} */
    const models = await (await ask("/v1/models")).json();
    model.textContent = models.data[0]?.id ?? "the model is being loaded";
    if (!models.data.length) setTimeout(nameModel, 2000);
    say("");
  } catch (error) {
    const needsKey = error instanceof Error && error.name === "NeedsKey";
    say(needsKey ? "This server wants an API key: see Settings." : String(error));
    if (needsKey) at("settings", HTMLDetailsElement).open = true;
  }
}

const views = [...document.querySelectorAll("[data-show]")].filter((one) => one instanceof HTMLElement);
for (const button of views) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.show;
    for (const other of views) other.setAttribute("aria-pressed", String(other === button));
  });
}
key.value = currentKey();
key.addEventListener("change", () => { setKey(key.value); nameModel(); sharing.follow(); });
if (matchMedia("(max-width: 70rem)").matches) at("conversations", HTMLDetailsElement).open = false;

new Chat(say);
nameModel();
sharing.follow();
