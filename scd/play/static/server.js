// The server: its socket, its pictures of start clips, its recordings. The page of a world without a
// server (scd/web) is this page with another file in the place of this one.

/** Who computes the frames, as messages name it. */
export const WHO = "The server";

// Make an address of the server, with the token of this page's own address.
function address(path, parameters = {}) {
  const url = new URL(path, new URL(".", location.href));
  const token = new URLSearchParams(location.search).get("token");
  const all = token === null ? parameters : { ...parameters, token };
  for (const [name, value] of Object.entries(all)) url.searchParams.set(name, value);
  return url;
}

/** Open a socket; with the id of an earlier session (or null), to go on with it. */
export function openSocket(session) {
  const url = address("ws", session ? { session } : {});
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  return socket;
}

/** The address of a start clip's picture. */
export function startPicture(name) {
  return address(`starts/${name}.png`);
}

/** Make a video of frames first..last: {blob, name, first}; `first` may be a later frame. */
export async function recordVideo(session, range) {
  const answer = await fetch(address("recording.mp4", { session, ...range }));
  if (!answer.ok) throw new Error(await answer.text());
  const disposition = answer.headers.get("Content-Disposition") ?? "";
  const named = /filename(?:\*=UTF-8''|="?)([^";]+)/.exec(disposition)?.[1] ?? "scd.mp4";
  const [name, first] = [decodeURIComponent(named), Number(answer.headers.get("First-Frame"))];
  return { blob: await answer.blob(), name, first };
}
