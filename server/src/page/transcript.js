// The conversation on the screen. Each turn has a view; what is clicked in one is told to `on`.

import { rate } from './conversation.js';
import { Markdown } from './markdown.js';

const scroller = document.getElementById('scroll');
const list = document.getElementById('transcript');
const copy = (id) => document.getElementById(id).content.cloneNode(true).firstElementChild;
const count = (number) => number.toLocaleString('en');

// Whether the end is in view; who scrolled up is left where they are.
export const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
export const toEnd = () => { scroller.scrollTop = scroller.scrollHeight; };

// Lets a text area be as high as its text.
export function grow(area) {
  area.style.height = 'auto';
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

// Copies, and says so on the button.
export async function copied(button, text) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = 'Copied';
  } catch {
    button.textContent = 'Not allowed';
  }
  setTimeout(() => { button.textContent = label; }, 1500);
}

// What happened to an answer, in a line.
function stats(turn) {
  const parts = [];
  if (turn.first !== null) parts.push(`${((turn.first - turn.began) / 1000).toFixed(2)} s to first token`);
  const speed = rate(turn);
  if (speed) parts.push(`${speed.exact ? '' : '≈ '}${speed.value.toFixed(1)} tok/s`);
  if (turn.usage) {
    const { prompt_tokens: prompt, completion_tokens: answer } = turn.usage;
    const cached = turn.usage.prompt_tokens_details?.cached_tokens;
    const thought = turn.usage.completion_tokens_details?.reasoning_tokens;
    parts.push(`${count(answer)} tokens${thought ? ` (${count(thought)} of reasoning)` : ''}`);
    parts.push(`prompt ${count(prompt)}${cached ? ` (${count(cached)} cached)` : ''}`);
  }
  // Lines break between the facts, not within them.
  return parts.map((part) => part.replaceAll(' ', '\u00a0')).join('  ·  ');
}

function note(turn) {
  if (turn.state === 'stopped') return 'Stopped.';
  if (turn.state === 'done' && turn.finish === 'length') return 'Cut off: the most tokens it may have are written.';
  if (turn.state === 'done' && !turn.content && !turn.reasoning && !turn.calls.length) return 'The answer is empty.';
  return '';
}

// Arguments are JSON once they are whole. Until then, and if they never are, they are shown as they came.
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

class UserView {
  constructor(turn, on) {
    this.turn = turn;
    this.element = copy('user-turn');
    this.element.querySelector('.bubble').textContent = turn.content;
    this.element.querySelector('[data-action=edit]').addEventListener('click', () => this.#edit(on));
  }

  #edit(on) {
    const form = copy('edit-form');
    const area = form.querySelector('textarea');
    const close = () => {
      form.remove();
      this.element.classList.remove('editing');
      this.element.querySelector('[data-action=edit]').focus();
    };
    area.value = this.turn.content;
    area.addEventListener('input', () => grow(area));
    area.addEventListener('keydown', (event) => {
      if (event.key === 'Escape') {
        event.stopPropagation();
        close();
      } else if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    form.querySelector('[data-action=cancel]').addEventListener('click', close);
    form.addEventListener('submit', (event) => {
      event.preventDefault();
      if (area.value.trim()) on.edit(this.turn, area.value);
    });
    this.element.classList.add('editing');
    this.element.append(form);
    grow(area);
    area.focus();
  }

  remove() {
    this.element.remove();
  }
}

class AssistantView {
  #frame = null;
  #touched = false;
  #thoughts = '';
  #calls = [];

  constructor(turn, on) {
    this.turn = turn;
    this.on = on;
    this.element = copy('assistant-turn');
    this.part = (name) => this.element.querySelector(name);
    this.markdown = new Markdown(this.part('.answer'));
    this.part('summary').addEventListener('click', () => { this.#touched = true; });
    this.part('footer [data-action=copy]').addEventListener('click', ({ target }) => copied(target, this.turn.content));
    for (const button of this.element.querySelectorAll('[data-action=regenerate]')) {
      button.addEventListener('click', () => on.regenerate(turn));
    }
    this.draw();
  }

  // Draws soon: at most once a frame, whatever comes in between.
  update() {
    this.#frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    if (this.#frame !== null) cancelAnimationFrame(this.#frame);
    this.#frame = null;
    const { turn } = this;
    const follow = atEnd();
    const live = turn.state === 'waiting' || turn.state === 'writing';
    this.element.dataset.state = turn.state;
    this.element.setAttribute('aria-busy', String(live));
    this.#progress(turn);
    this.#reasoning(turn, live);
    if (turn.content) this.markdown.render(turn.content);
    this.#showCalls(turn, live);
    const said = note(turn);
    this.part('.note').hidden = !said;
    this.part('.note').textContent = said;
    this.part('.error').hidden = !turn.error;
    this.part('.error p').textContent = turn.error ?? '';
    this.part('.error button').hidden = live;
    this.part('footer').hidden = turn.state === 'waiting' || (turn.state === 'failed' && turn.first === null);
    this.part('.actions').hidden = live;
    this.part('footer [data-action=copy]').hidden = !navigator.clipboard || !turn.content;
    this.part('.stats').textContent = stats(turn);
    if (follow) toEnd();
  }

  #progress(turn) {
    const waiting = turn.state === 'waiting';
    this.part('.progress').hidden = !waiting;
    if (!waiting) return;
    const { text, done, total } = turn.progress ?? { text: 'Waiting for the first token' };
    this.part('.progress-text').textContent = text;
    const bar = this.part('progress');
    bar.hidden = !total;
    if (total) {
      bar.max = total;
      bar.value = done;
      bar.setAttribute('aria-label', 'Prompt read');
    }
  }

  #reasoning(turn, live) {
    if (!turn.reasoning) return;
    const box = this.part('.reasoning');
    const thinking = live && turn.thought === null;
    const follows = this.part('.thoughts');
    const down = follows.scrollHeight - follows.scrollTop - follows.clientHeight < 40;
    box.hidden = false;
    if (!this.#touched) box.open = turn.thought === null;
    const seconds = (((turn.thought ?? turn.last) - turn.first) / 1000).toFixed(1);
    this.part('summary').textContent = thinking ? 'Reasoning…' : `Reasoned for ${seconds} s`;
    follows.append(turn.reasoning.slice(this.#thoughts.length));
    this.#thoughts = turn.reasoning;
    if (down) follows.scrollTop = follows.scrollHeight;
  }

  #showCalls(turn, live) {
    if (!turn.calls.length) return;
    const box = this.part('.calls');
    box.hidden = false;
    for (const [at, call] of turn.calls.entries()) {
      let card = this.#calls[at];
      if (!card) {
        card = copy('tool-call');
        this.#calls.push(card);
        box.append(card);
        card.querySelector('textarea').addEventListener('input', ({ target }) => grow(target));
      }
      card.querySelector('.call-name').textContent = call.name;
      card.querySelector('.call-arguments').textContent = pretty(call.arguments);
      card.querySelector('.call-ask').hidden = live || call.result !== null;
      card.querySelector('.call-result').hidden = call.result === null;
      card.querySelector('.call-result pre').textContent = call.result ?? '';
    }
    const open = !live && turn.calls.some((call) => call.result === null);
    let send = box.querySelector('.send-results');
    if (open && !send) {
      send = document.createElement('button');
      send.type = 'button';
      send.className = 'send-results primary';
      send.textContent = turn.calls.length > 1 ? 'Send results' : 'Send result';
      send.addEventListener('click', () => {
        const texts = this.#calls.map((card) => card.querySelector('textarea').value);
        this.on.results(turn, texts);
      });
      box.append(send);
    } else if (!open) {
      send?.remove();
    }
  }

  remove() {
    if (this.#frame !== null) cancelAnimationFrame(this.#frame);
    this.element.remove();
  }
}

// Adds a turn's view.
export function show(turn, on) {
  const view = turn.role === 'user' ? new UserView(turn, on) : new AssistantView(turn, on);
  list.append(view.element);
  return view;
}

list.addEventListener('click', ({ target }) => {
  const button = target.closest('[data-action=copy-code]');
  if (button) copied(button, button.closest('.code-block').querySelector('pre').textContent);
});
