// Follows the colours of the system, and sends the application's CSRF token with requests that are
// tried on the page.
"use strict";

const viewer = document.querySelector("rapi-doc");
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => viewer.setAttribute("theme", dark.matches ? "dark" : "light");
dark.addEventListener("change", follow);
follow();

const { csrfCookie, csrfHeader } = viewer.dataset;
viewer.addEventListener("before-try", (event) => {
  const pairs = document.cookie.split("; ").filter((pair) => pair.startsWith(`${csrfCookie}=`));
  if (csrfCookie && pairs.length > 0) {
    event.detail.request.headers.append(csrfHeader, pairs[0].slice(csrfCookie.length + 1));
  }
});
