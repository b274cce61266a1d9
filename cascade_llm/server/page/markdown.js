// Markdown as elements: each is made by its name and filled with text nodes, so no text of a model is ever parsed as HTML.
// The common part of CommonMark and GitHub's tables; what is not understood stays as it was written.
// @ts-check
import { element } from "./elements.js";

const MOST_LEVELS = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}(?:(?:- *){3,}|(?:\* *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const TABLE_LINE = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const SAFE_LINKS = ["http:", "https:", "mailto:"];

/** One block: the lines that make it, and how they are drawn. @typedef {{lines: string[], draw: () => HTMLElement}} Block */

/** Keeps an element at the Markdown of a text that grows: blocks that stay as they are keep their elements. */
export class MarkdownView {
  /** @param {HTMLElement} holder */
  constructor(holder) {
    this.holder = holder;
    /** @type {string[]} */
    this.sources = [];
  }

  /** @param {string} text */
  show(text) {
    const found = blocks(text.split("\n"), 0), sources = found.map((block) => block.lines.join("\n"));
    let same = 0;
    while (same < sources.length && sources[same] === this.sources[same]) same += 1;
    while (this.holder.children.length > same) this.holder.lastElementChild?.remove();
    this.holder.append(...found.slice(same).map((block) => block.draw()));
    this.sources = sources;
  }
}

/** @param {string[]} lines @param {number} level @returns {Block[]} */
function blocks(lines, level) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const end = Math.max(at + 1, endOfBlock(lines, at)), own = lines.slice(at, end);
    found.push({ lines: own, draw: () => drawBlock(own, level) });
    at = end;
  }
  return found;
}

/** @param {string} line */
const beginsBlock = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

/** @param {string[]} lines @param {number} at */
function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && TABLE_LINE.test(lines[at + 1])
    && cells(lines[at]).length === cells(lines[at + 1]).length;
}

/** Where the block that begins at a line ends. @param {string[]} lines @param {number} at */
function endOfBlock(lines, at) {
  const first = lines[at], fence = FENCE.exec(first);
  let end = at + 1;
  if (fence) {
    const closes = (/** @type {string} */ line) => line.trim().startsWith(fence[1]) && !line.trim().replaceAll(fence[1][0], "");
    while (end < lines.length && !closes(lines[end])) end += 1;
    return Math.min(end + 1, lines.length);
  }
  if (HEADING.test(first) || RULE.test(first)) return end;
  if (QUOTE.test(first)) {
    while (end < lines.length && QUOTE.test(lines[end])) end += 1;
    return end;
  }
  if (isTable(lines, at)) {
    while (end < lines.length && lines[end].includes("|")) end += 1;
    return end;
  }
  if (ITEM.test(first)) return endOfList(lines, at);
  while (end < lines.length && lines[end].trim() && !beginsBlock(lines[end]) && !isTable(lines, end)) end += 1;
  return end;
}

/** A list goes on over blank lines where an item of its kind or what is indented follows. @param {string[]} lines @param {number} at */
function endOfList(lines, at) {
  const kind = isOrdered(lines[at]);
  let end = at + 1;
  for (let next = at + 1; next < lines.length; next += 1) {
    const line = lines[next];
    if (!line.trim()) continue;
    const isInside = line.startsWith("  ") || (ITEM.test(line) && !RULE.test(line) && isOrdered(line) === kind);
    const isLazy = end === next && !beginsBlock(line);
    if (!isInside && !isLazy) break;
    end = next + 1;
  }
  return end;
}

/** @param {string} line */
const isOrdered = (line) => /^ *\d/.test(line);

/** @param {string[]} lines of one block @param {number} level */
function drawBlock(lines, level) {
  const first = lines[0], fence = FENCE.exec(first), heading = HEADING.exec(first);
  if (fence) return drawCode(lines, fence);
  if (heading) return filled(`h${Math.min(6, heading[1].length + 3)}`, heading[2].replace(/\s+#+\s*$/, ""));
  if (RULE.test(first)) return element("hr");
  if (level < MOST_LEVELS && QUOTE.test(first)) {
    const quote = element("blockquote");
    quote.append(...blocks(lines.map((line) => line.replace(QUOTE, "")), level + 1).map((block) => block.draw()));
    return quote;
  }
  if (isTable(lines, 0)) return drawTable(lines);
  if (level < MOST_LEVELS && ITEM.test(first)) return drawList(lines, level);
  return filled("p", lines.map((line) => line.trimStart()).join("\n"));
}

/** @param {string[]} lines @param {RegExpExecArray} fence */
function drawCode(lines, fence) {
  const last = lines[lines.length - 1].trim(), isClosed = lines.length > 1 && last.startsWith(fence[1]) && !last.replaceAll(fence[1][0], "");
  const block = element("pre"), code = element("code", "", lines.slice(1, isClosed ? -1 : undefined).join("\n"));
  block.tabIndex = 0; // wide code is scrolled by the keyboard too
  block.setAttribute("aria-label", fence[2] ? `Code: ${fence[2]}` : "Code");
  block.append(code);
  return block;
}

/** @param {string[]} lines @param {number} level */
function drawList(lines, level) {
  const list = element(isOrdered(lines[0]) ? "ol" : "ul"), start = /\d+/.exec(lines[0]);
  if (list.tagName === "OL" && start) list.setAttribute("start", String(Number(start[0])));
  const indent = indentOf(lines[0]);
  /** @type {string[][]} */
  const items = [];
  let width = 0;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (!items.length || (item && item[1].length < indent + Math.max(2, width - indent))) {
      if (!item) items.push([line]);
      else {
        width = item[0].length;
        items.push([line.slice(width)]);
      }
    } else items[items.length - 1].push(line.slice(Math.min(width, indentOf(line))));
  }
  list.append(...items.map((own) => drawItem(own, level)));
  return list;
}

/** @param {string[]} lines @param {number} level */
function drawItem(lines, level) {
  const item = element("li");
  for (const block of blocks(lines, level + 1)) {
    const drawn = block.draw();
    if (drawn.tagName === "P" && !item.childNodes.length) item.append(...drawn.childNodes);
    else item.append(drawn);
  }
  return item;
}

/** @param {string} line */
const indentOf = (line) => line.length - line.trimStart().length;

/** @param {string} line */
const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|");

/** @param {string[]} lines */
function drawTable(lines) {
  const holder = element("div", "table"), table = element("table"), numColumns = cells(lines[0]).length;
  const row = (/** @type {string} */ line, /** @type {string} */ name) => {
    const drawn = element("tr");
    drawn.append(...cells(line).slice(0, numColumns).map((cell) => filled(name, cell.trim())));
    return drawn;
  };
  table.append(row(lines[0], "th"), ...lines.slice(2).map((line) => row(line, "td")));
  holder.append(table);
  return holder;
}

/** @param {string} name @param {string} text */
function filled(name, text) {
  const made = element(name);
  made.append(...inline(text, 0));
  return made;
}

/** What stands in a line. @param {string} text @param {number} level @returns {Node[]} */
function inline(text, level) {
  /** @type {Node[]} */
  const nodes = [];
  /** Marks that have no end behind the place. @type {Set<string>} */
  const open = new Set();
  let plain = "";
  const add = (/** @type {Node} */ node) => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
    nodes.push(node);
  };
  for (let at = 0; at < text.length;) {
    const found = level < MOST_LEVELS ? span(text, at, level, open) : null;
    if (found) {
      add(found.node);
      at = found.end;
    } else if (text[at] === "\\" && PUNCTUATION.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (text[at] === "`" || text[at] === "*" || text[at] === "_") { // the rest of a run of marks is no mark
      const end = endOfRun(text, at);
      plain += text.slice(at, end);
      at = end;
    } else {
      plain += text[at];
      at += 1;
    }
  }
  if (plain) nodes.push(document.createTextNode(plain));
  return nodes;
}

/** @param {string} text @param {number} at */
function endOfRun(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end;
}

/** The marked part that begins here, if one does.
 * @param {string} text @param {number} at @param {number} level @param {Set<string>} open
 * @returns {{node: Node, end: number} | null} */
function span(text, at, level, open) {
  switch (text[at]) {
    case "`": return codeSpan(text, at, open);
    case "[": return link(text, at, level, open);
    case "*": case "_": case "~": return emphasis(text, at, level, open);
    case "\n": return { node: element("br"), end: at + 1 };
    case "h": return bareLink(text, at);
    default: return null;
  }
}

/** @param {string} text @param {number} at @param {Set<string>} open */
function codeSpan(text, at, open) {
  const begin = endOfRun(text, at), mark = text.slice(at, begin);
  for (let end = begin; !open.has(mark);) {
    end = text.indexOf(mark, end);
    if (end < 0) {
      open.add(mark);
      break;
    }
    const after = endOfRun(text, end);
    if (after - end === mark.length) {
      const code = text.slice(begin, end).replaceAll("\n", " ");
      const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "";
      return { node: element("code", "", isPadded ? code.slice(1, -1) : code), end: after };
    }
    end = after;
  }
  return null;
}

/** @param {string} text @param {number} at @param {number} level @param {Set<string>} open */
function link(text, at, level, open) {
  const middle = open.has("](") ? -1 : text.indexOf("](", at);
  if (middle < 0) open.add("](");
  if (middle < 0 || text.lastIndexOf("[", middle) !== at) return null;
  const end = text.indexOf(")", middle), target = text.slice(middle + 2, end).trim().split(/\s/)[0];
  const node = end < 0 ? null : anchor(target, inline(text.slice(at + 1, middle), level + 1));
  return node && { node, end: end + 1 };
}

/** @param {string} text @param {number} at */
function bareLink(text, at) {
  if (at > 0 && /[\w/]/.test(text[at - 1])) return null;
  const found = /^https?:\/\/[^\s<>"'`*|)\]]{1,2000}/.exec(text.slice(at, at + 2020));
  if (!found) return null;
  const target = found[0].replace(/[.,;:!?]+$/, ""), node = anchor(target, [document.createTextNode(target)]);
  return node && { node, end: at + target.length };
}

/** A link that runs nothing and tells the other side nothing. @param {string} target @param {Node[]} inner */
function anchor(target, inner) {
  if (!URL.canParse(target) || !SAFE_LINKS.includes(new URL(target).protocol)) return null;
  const made = element("a");
  made.setAttribute("href", target);
  made.setAttribute("target", "_blank");
  made.setAttribute("rel", "noopener noreferrer nofollow");
  made.append(...inner);
  return made;
}

/** @param {string} text @param {number} at @param {number} level @param {Set<string>} open */
function emphasis(text, at, level, open) {
  const char = text[at], run = endOfRun(text, at) - at;
  const name = char === "~" ? "del" : run === 1 ? "em" : "strong", mark = char.repeat(name === "em" ? 1 : 2);
  const begin = at + mark.length, inWord = char === "_" && at > 0 && /\w/.test(text[at - 1]);
  if (run > 3 || run < mark.length || open.has(mark) || inWord || !text[begin]?.trim()) return null;
  let end = text.indexOf(mark, begin + run - mark.length);
  while (name === "em" && end >= 0 && endOfRun(text, end) - end === 2) end = text.indexOf(mark, end + 2);
  if (end < 0) {
    open.add(mark);
    return null;
  }
  if (run === 3 && name === "strong") end = text.indexOf(mark, end + 1) === end + 1 ? end + 1 : end;
  const after = end + mark.length, isWithinWord = char === "_" && /\w/.test(text[after] ?? "");
  if (!text[end - 1].trim() || end === begin || isWithinWord) return null;
  const node = element(name);
  node.append(...inline(text.slice(begin, end), level + 1));
  return { node, end: after };
}
