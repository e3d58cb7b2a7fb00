// Talking to the server, and drafts in this browser. An answer is sent again until the server acknowledges it.

const address = new URLSearchParams(location.search);
export const annotator = address.get("annotator") ?? "";
const token = address.get("token") ?? "";

export class Refused extends Error {
  constructor(status, content) {
    super(content.error ?? `status ${status}`);
    this.status = status;
    this.content = content;
  }
}

/** Send one request. Throws Refused for an error response, TypeError if the server cannot be reached. */
export async function ask(path, { body, params = {} } = {}) {
  const query = new URLSearchParams({ ...(annotator ? { annotator } : {}), ...params });
  const response = await fetch(`${path}?${query}`, {
    method: body === undefined ? "GET" : "POST",
    headers: { authorization: `Bearer ${token}`, ...(body === undefined ? {} : { "content-type": "application/json" }) },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const content = await response.json().catch(() => ({}));
  if (response.status === 401 && content.needs === "password" && path !== "/api/login") {
    await password();
    return ask(path, { body, params });
  }
  if (!response.ok) throw new Refused(response.status, content);
  return content;
}

/** Repeat a request until the server answers. Calls `waiting(message)` before each wait, and `waiting(null)` at the end. */
export async function askPatiently(path, options, waiting) {
  for (let pause = 500; ; pause = Math.min(2 * pause, 5000)) {
    try {
      const content = await ask(path, options);
      waiting(null);
      return content;
    } catch (error) {
      if (error instanceof Refused && error.status < 500) throw error;
      waiting(error instanceof Refused ? error.message : "The server cannot be reached.");
      await new Promise((done) => setTimeout(done, pause));
    }
  }
}

async function password() {
  const dialog = document.getElementById("login"), form = document.getElementById("login-form");
  const field = document.getElementById("password"), hint = document.getElementById("login-hint");
  if (!dialog.open) dialog.showModal();
  for (;;) {
    await new Promise((done) => form.addEventListener("submit", (event) => { event.preventDefault(); done(); }, { once: true }));
    try {
      await ask("/api/login", { body: { password: field.value } });
      dialog.close();
      return;
    } catch (error) {
      hint.textContent = error.message;
      field.value = "";
      field.focus();
    }
  }
}

/** An id for an answer; crypto.randomUUID exists on secure addresses only. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Drafts: answers that are not sent yet. If the browser's storage is disabled, they are lost when the page is closed.

const storageKey = (name) => `stages-label:${annotator}:${name}`;

export function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(storageKey(name));
    else localStorage.setItem(storageKey(name), JSON.stringify(value));
  } catch { /* no storage */ }
}

export function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(storageKey(name)));
  } catch {
    return null;
  }
}

/** The theme button switches between the system's theme and the other one. */
export function themeButton(button) {
  const root = document.documentElement;
  const stored = recall("theme");
  if (stored) root.dataset.theme = stored;
  button.addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    remember("theme", root.dataset.theme);
  });
}

/** An element with attributes and children; strings become text, never markup. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
