// Requests to the process that served this page. All addresses are relative to the page.

const TIMEOUT_MS = 8000;

/** The address of the session. */
export const SESSION = "ui/session";

/** Return the address of data, from the view, the id and the action; an id may have any character. */
export const address = (...parts) => `ui/data/${parts.map(encodeURIComponent).join("/")}`;

/** An answer other than 2xx or without data, or no answer (status 0). `detail` is a sentence for people. */
export class Problem extends Error {
  constructor(status, body, retryAfter) {
    super(body.detail || body.title || `The process answered ${status}.`);
    this.status = status;
    this.code = body.code || "";
    this.errors = body.errors || [];
    this.correlationId = body.correlationId || "";
    this.retryAfter = retryAfter;
  }
}

const listeners = new Set();

/** Call `listener` after each answer 401: the session has ended. */
export function onUnauthorized(listener) {
  listeners.add(listener);
}

/** Return the JSON of an answer, or null without a body. Throws a Problem. */
export async function call(method, path, body, timeout = TIMEOUT_MS) {
  let response;
  try {
    response = await fetch(path, {
      method,
      cache: "no-store",
      redirect: "error",
      signal: AbortSignal.timeout(timeout),
      ...(method === "GET"
        ? {}
        : { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body || {}) }),
    });
  } catch (error) {
    const late = error.name === "TimeoutError";
    throw new Problem(0, {
      detail: late ? `No answer within ${timeout / 1000} s.` : "The process does not answer.",
    });
  }
  let data = null;
  try {
    const text = await response.text();
    data = text ? JSON.parse(text) : null;
  } catch {
    data = null; // A proxy in between may answer with a page of its own.
  }
  const odd = response.status !== 204 && (data === null || typeof data !== "object");
  if (response.ok && odd) {
    throw new Problem(response.status, {
      detail: "The answer is not one of the process. A proxy may have given it: load the page again.",
    });
  }
  // A backend that does not answer is no error of the request, so that the browser logs none.
  if (response.ok && !(data && data.available === false)) return data;
  if (response.status === 401 && path !== SESSION) listeners.forEach((listener) => listener());
  throw new Problem(response.status, data || {}, Number(response.headers.get("Retry-After")) || 0);
}

export const get = (path, timeout) => call("GET", path, null, timeout);

/** Send an action; the process ends one after 30 s. */
export async function post(path, body) {
  try {
    return await call("POST", path, body, 35000);
  } catch (error) {
    if (error.status === 0) error.message += " The action may have had its effect: look before you repeat it.";
    throw error;
  }
}

/** Return a query string without the empty values. */
export function query(values) {
  const kept = Object.entries(values).filter(([, value]) => value !== "" && value != null);
  return new URLSearchParams(kept).toString();
}
