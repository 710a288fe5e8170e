// The site's files: their addresses, and their bytes, checked against the manifest.

const ROOT = new URL("..", import.meta.url);

/** The address of a file of the site. */
export const url = (name) => new URL(name, ROOT).href;

// What the service worker kept in vain is fetched again the next time.
async function forget(address) {
  try {
    for (const name of await caches.keys()) await (await caches.open(name)).delete(address);
  } catch (error) {
    console.warn("what is kept cannot be changed:", error);
  }
}

export async function loadManifest() {
  const answer = await fetch(url("manifest.json"));
  if (!answer.ok) throw new Error(`manifest.json: ${answer.status}`);
  return answer.json();
}

/** Loads files; calls `progress(bytes so far)`. */
export class Files {
  #listed;
  #progress;
  #done = 0;

  constructor(listed, progress) {
    this.#listed = listed;
    this.#progress = progress;
  }

  /** Resolve to a file's bytes, which must be the listed ones. */
  async bytes(name) {
    const { bytes, sha256 } = this.#listed[name];
    const answer = await fetch(url(name));
    if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
    const data = new Uint8Array(bytes);
    const reader = answer.body.getReader();
    let at = 0;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (at + value.length <= bytes) data.set(value, at);
      at += value.length;
      this.#progress((this.#done += value.length));
    }
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (at !== bytes || hex !== sha256) {
      await forget(url(name));
      throw new Error(`${name}: not the file of this site; reload the page`);
    }
    return data;
  }
}
