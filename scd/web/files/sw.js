// The service worker: keeps the site's files for use offline, and adds the headers that browsers
// want to see before they share memory between threads (cross-origin isolation).

const VERSION = "__VERSION__"; // of all files
const CACHE = `scd ${new URL(".", location.href).pathname} ${VERSION}`;
const PAGE = ["./", "manifest.json", ..."__FILES__"]; // the large files are kept once they are used
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

addEventListener("install", (event) => {
  const fresh = PAGE.map((name) => new Request(name, { cache: "reload" }));
  const kept = caches.open(CACHE).then((cache) => cache.addAll(fresh));
  event.waitUntil(kept.catch(unlessIncomplete).then(begin));
});

addEventListener("activate", (event) => {
  const mine = CACHE.slice(0, CACHE.lastIndexOf(" ") + 1); // not the caches of folders below
  const old = (name) => name.startsWith(mine) && name !== CACHE;
  event.waitUntil(
    caches.keys()
      .then((names) => Promise.all(names.filter(old).map((name) => caches.delete(name))))
      .then(() => clients.claim()),
  );
});

addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== "GET" || url.origin !== location.origin) return;
  event.respondWith(answer(event.request));
});

// Pages that are open go on with the version that they began with; its files would not fit this
// one. The only page that is open asks for this one when it is loaded.
function begin() {
  if (!registration.active) return skipWaiting();
}

addEventListener("message", (event) => event.waitUntil(beginForTheOnly(event.ports[0])));

async function beginForTheOnly(page) {
  const all = await clients.matchAll({ type: "window", includeUncontrolled: true });
  const here = all.filter(({ url }) => url.startsWith(registration.scope));
  if (here.length > 1) page.postMessage("later");
  else await skipWaiting();
}

// What could not be fetched is a TypeError: an earlier version of the site, if there is one, then
// goes on with what was kept of it.
function unlessIncomplete(error) {
  if (error instanceof TypeError && registration.active) throw error;
  playOnlineOnly(error);
}

// On a full disk, or where a browser keeps nothing for a site, the page plays all the same.
function playOnlineOnly(error) {
  console.warn("not kept for use offline:", error);
}

async function answer(request) {
  const kept = await caches.open(CACHE).catch(playOnlineOnly);
  // Parameters of the address are for the page, not for the host.
  let found = await kept?.match(request, { ignoreSearch: true });
  if (!found) {
    // Not what the browser has kept by itself, which may be of an earlier version of the site.
    const navigates = request.mode === "navigate"; // and cannot be made anew with its own mode
    found = navigates
      ? await fetch(request.url, { cache: "no-cache", redirect: "manual" })
      : await fetch(request, { cache: "no-cache" });
    if (found.type === "opaqueredirect") return found;
    if (found.status === 200) await kept?.put(request, found.clone()).catch(playOnlineOnly);
  }
  const headers = new Headers(found.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(found.body, { status: found.status, statusText: found.statusText, headers });
}
