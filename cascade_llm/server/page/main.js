// Puts the page together.
// @ts-check
import { Chat } from "./chat.js";
import { ask, currentKey, setKey } from "./server.js";
import { SharingView } from "./sharing.js";

const at = (/** @type {string} */ id) => /** @type {any} */ (document.getElementById(id));
const say = (/** @type {string} */ text) => { at("status").textContent = text; };
const sharing = new SharingView();

async function nameModel() {
  try {
    const models = await (await ask("/v1/models")).json();
    at("model").textContent = models.data[0]?.id ?? "the model is being loaded";
    if (!models.data.length) setTimeout(nameModel, 2000);
    say("");
  } catch (error) {
    say(/** @type {Error} */ (error).name === "NeedsKey" ? "This server wants an API key: see Settings." : String(error));
    if (/** @type {Error} */ (error).name === "NeedsKey") at("settings").open = true;
  }
}

for (const button of /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll("[data-show]"))) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.show;
    for (const other of document.querySelectorAll("[data-show]")) other.setAttribute("aria-pressed", String(other === button));
  });
}
at("key").value = currentKey();
at("key").addEventListener("change", () => { setKey(at("key").value); nameModel(); sharing.follow(); });
if (matchMedia("(max-width: 70rem)").matches) at("conversations").open = false;

new Chat(say);
nameModel();
sharing.follow();
