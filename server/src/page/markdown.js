// Answers as Markdown. Tags in an answer are text, nothing is fetched for it, and no string of it is ever made HTML without
// being sanitised: the page's Content-Security-Policy (trusted types) has the browser see to that.

import { Marked } from './vendor/marked/marked.esm.js';
import DOMPurify from './vendor/dompurify/purify.es.mjs';

const ENTITIES = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;' };
const escaped = (text) => text.replace(/[&<>"']/g, (letter) => ENTITIES[letter]);

const marked = new Marked({
  gfm: true,
  renderer: {
    html({ text, block }) {
      return block ? `<p>${escaped(text.trim())}</p>` : escaped(text);
    },
    // An image would be fetched from wherever a model says.
    image({ href, text }) {
      return `<a href="${escaped(href)}">${escaped(text || href)}</a>`;
    },
    checkbox({ checked }) {
      return checked ? '☑ ' : '☐ ';
    },
  },
});

const RULES = {
  ALLOWED_TAGS: [
    'a', 'blockquote', 'br', 'code', 'del', 'em', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6', 'hr', 'li', 'ol', 'p', 'pre', 'strong',
    'table', 'tbody', 'td', 'th', 'thead', 'tr', 'ul',
  ],
  ALLOWED_ATTR: ['align', 'class', 'href', 'start', 'title'],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  // Not addresses, so not held against that.
  ADD_URI_SAFE_ATTR: ['align', 'start'],
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook('afterSanitizeAttributes', (node) => {
  if (node.nodeName !== 'A') return;
  node.setAttribute('target', '_blank');
  node.setAttribute('rel', 'noopener noreferrer');
});

// Gives wide things room to scroll, and code its name and a button.
function furnish(fragment) {
  for (const table of fragment.querySelectorAll('table')) {
    const frame = document.createElement('div');
    frame.className = 'wide';
    frame.tabIndex = 0;
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const pre of fragment.querySelectorAll('pre')) {
    const block = document.getElementById('code-block').content.cloneNode(true).firstElementChild;
    const language = /language-(\S+)/.exec(pre.firstElementChild?.className ?? '')?.[1];
    block.querySelector('span').textContent = language ?? '';
    block.querySelector('button').hidden = !navigator.clipboard;
    pre.tabIndex = 0;
    pre.replaceWith(block);
    block.append(pre);
  }
  return fragment;
}

// Shows a growing text in `root`. Only blocks that changed are made anew, so that a long answer stays quick and what is
// selected in its finished part stays selected.
export class Markdown {
  #root;
  #blocks = [];
  #links = '';

  constructor(root) {
    this.#root = root;
  }

  render(text) {
    try {
      this.#render(text);
    } catch (error) {
      // Nested too deep for the parser, say. The text itself is what matters.
      console.warn('the answer is shown as plain text:', error);
      this.#blocks = [];
      const plain = document.createElement('p');
      plain.textContent = text;
      this.#root.replaceChildren(plain);
    }
  }

  #render(text) {
    const tokens = marked.lexer(text);
    const links = JSON.stringify(tokens.links);
    let same = 0;
    if (links === this.#links) {
      while (same < Math.min(tokens.length, this.#blocks.length) && tokens[same].raw === this.#blocks[same].raw) same += 1;
    }
    this.#links = links;
    if (!same) this.#root.replaceChildren();
    for (const { nodes } of this.#blocks.splice(same)) for (const node of nodes) node.remove();
    for (const token of tokens.slice(same)) {
      const fragment = furnish(DOMPurify.sanitize(marked.parser([token]), RULES));
      const nodes = [...fragment.childNodes];
      this.#root.append(fragment);
      this.#blocks.push({ raw: token.raw, nodes });
    }
  }
}
