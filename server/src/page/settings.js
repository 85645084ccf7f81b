// What the panel asks for. What is empty is not sent, and what is wrong is for the server to refuse by name.

const KEY = 'mesh-llm.api-key';
const field = (id) => document.getElementById(id);

// Numbers as numbers; anything else as it was typed, so that the server's refusal quotes it.
function number(id) {
  const text = field(id).value.trim();
  if (!text) return undefined;
  const value = Number(text);
  if (Number.isInteger(value) && !Number.isSafeInteger(value)) {
    throw new Error(`${id} is ${text}, more than a browser can send exactly; use at most ${Number.MAX_SAFE_INTEGER}`);
  }
  return Number.isFinite(value) ? value : text;
}

function tools() {
  const text = field('tools').value.trim();
  if (!text) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`Tools is not JSON: ${error.message}`);
  }
}

// The fields of a request that the panel decides. Fields that are undefined are not part of the JSON.
export function knobs() {
  const thinking = field('thinking').value;
  return {
    temperature: number('temperature'),
    top_p: number('top_p'),
    max_tokens: number('max_tokens'),
    seed: number('seed'),
    enable_thinking: thinking ? thinking === 'true' : undefined,
    tools: tools(),
  };
}

// The system prompt as it was typed, or nothing.
export const system = () => (field('system').value.trim() ? field('system').value : '');
export const key = () => field('key').value.trim();

// The panel's own workings. `onKey` is told when the key changes, `onShow` whether the panel is seen.
export function start(onKey, onShow) {
  const panel = field('settings');
  const toggle = field('settings-toggle');
  const show = (open) => {
    panel.hidden = !open;
    toggle.setAttribute('aria-expanded', String(open));
    onShow(open);
    if (open) field('system').focus();
    else toggle.focus();
  };
  toggle.addEventListener('click', () => show(panel.hidden));
  field('settings-close').addEventListener('click', () => show(false));
  panel.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape') return;
    event.stopPropagation();
    show(false);
  });
  field('settings-form').addEventListener('submit', (event) => event.preventDefault());
  field('key').value = sessionStorage.getItem(KEY) ?? '';
  field('key').addEventListener('change', () => {
    if (key()) sessionStorage.setItem(KEY, key());
    else sessionStorage.removeItem(KEY);
    onKey();
  });
}
