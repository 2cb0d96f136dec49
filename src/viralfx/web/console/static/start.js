// Starts the page. It imports nothing, so that it runs while the other modules arrive: it asks for
// the session meanwhile, and loads the page again if a module does not arrive. A browser ends all
// requests when a network of its machine comes or goes, and repeats none of them.

const AGAIN_MS = 1000;
const LATER_MS = 10000; // For a page that has been loaded again before, as its fault may last.

/** The first answer about the session, or null: without one the page asks again and says so. */
export const session = fetch("ui/session?start", {
  cache: "no-store",
  redirect: "error",
  signal: AbortSignal.timeout(8000),
})
  .then(async (response) => (response.ok ? { ...(await response.json()), at: performance.now() } : null))
  .catch(() => null);

const sleep = (wait) => new Promise((resolve) => setTimeout(resolve, wait));

/** Say why the page has not started, and load it again once the process answers. */
async function recover(error) {
  const { type } = performance.getEntriesByType("navigation")[0] || {};
  const wait = type === "reload" ? LATER_MS : AGAIN_MS;
  const text = `Disconnected. The page has not started: ${error.message}. It tries again every ${wait / 1000} s.`;
  const shown = document.querySelector("#app [role=status]");
  if (shown) shown.textContent = text;
  let answers = false;
  while (!answers) {
    await sleep(wait);
    // A reload while nothing answers would put an error of the browser in place of the page.
    answers = await fetch("ui", { cache: "no-store", signal: AbortSignal.timeout(8000) })
      .then((response) => response.ok)
      .catch(() => false);
  }
  location.reload();
}

/** Ask for the styles again until they are there. */
function restyle(attempt) {
  if (getComputedStyle(document.documentElement).getPropertyValue("--page")) return;
  const styles = document.querySelector("link[rel=stylesheet]");
  styles.onerror = () => setTimeout(restyle, AGAIN_MS, attempt + 1);
  styles.href = `ui/console.css?attempt=${attempt}`;
}

addEventListener("load", () => restyle(1));
import("./app.js").catch(recover);
