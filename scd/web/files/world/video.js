// A recording as WebM, by the browser's own encoder.

const ENLARGE = 4;
const CODECS = [["vp8", "V_VP8"], ["vp09.00.10.08", "V_VP9"]];
const KEY_EVERY = 60; // frames at most
const CLUSTER = 30; // seconds at most: its times are of 16 bits, with a sign

/** Encode pictures (RGB bytes, size × size) to a Blob. */
export async function encodeVideo(pictures, size, fps) {
  if (!self.VideoEncoder) throw new Error("this browser cannot encode videos (WebCodecs)");
  const side = ENLARGE * size;
  const base = { width: side, height: side, bitrate: 4_000_000, framerate: fps };
  let chosen = null;
  for (const [codec, name] of CODECS) {
    const { supported } = await VideoEncoder.isConfigSupported({ ...base, codec });
    if (supported) { chosen = { codec, name }; break; }
  }
  if (!chosen) throw new Error("this browser encodes neither VP8 nor VP9");
  const keyEvery = framesOfCluster(fps);
  const chunks = [];
  let failed = null;
  const encoder = new VideoEncoder({
    output: (chunk) => {
      const data = new Uint8Array(chunk.byteLength);
      chunk.copyTo(data);
      chunks.push({ data, key: chunk.type === "key" });
    },
    error: (error) => (failed = error),
  });
  encoder.configure({ ...base, codec: chosen.codec });
  for (const [i, rgb] of pictures.entries()) {
    const frame = new VideoFrame(enlarged(rgb, size), {
      format: "RGBX", codedWidth: side, codedHeight: side, timestamp: Math.round((1e6 * i) / fps),
    });
    const keyFrame = i % keyEvery === 0;
    if (keyFrame) await encoder.flush(); // or all frames would wait in memory
    encoder.encode(frame, { keyFrame });
    frame.close();
  }
  await encoder.flush();
  encoder.close();
  if (failed) throw failed;
  return new Blob([webm(chunks, side, fps, chosen.name)], { type: "video/webm" });
}

// The frames from one key frame to the next, which are a cluster.
function framesOfCluster(fps) {
  return Math.max(1, Math.min(KEY_EVERY, Math.floor(CLUSTER * fps)));
}

function enlarged(rgb, size) {
  const side = ENLARGE * size;
  const out = new Uint8Array(4 * side * side).fill(255);
  for (let y = 0, to = 0; y < side; y++) {
    for (let x = 0; x < side; x++, to += 4) {
      const from = 3 * (size * Math.floor(y / ENLARGE) + Math.floor(x / ENLARGE));
      for (let c = 0; c < 3; c++) out[to + c] = rgb[from + c];
    }
  }
  return out;
}

// WebM is Matroska: nested elements of an id, a length and contents (RFC 8794, RFC 9559).

function webm(chunks, side, fps, codec) {
  const ms = (i) => Math.round((1000 * i) / fps);
  const track = element(0xae, [
    number(0xd7, 1), number(0x73c5, 1), number(0x83, 1), text(0x86, codec), // number, id, video
    number(0x23e383, Math.round(1e9 / fps)), // default duration, ns
    element(0xe0, [number(0xb0, side), number(0xba, side)]),
  ]);
  const clusters = [];
  const size = framesOfCluster(fps);
  for (let first = 0; first < chunks.length; first += size) {
    const some = chunks.slice(first, first + size);
    clusters.push(element(0x1f43b675, [
      number(0xe7, ms(first)),
      ...some.map(({ data, key }, i) => {
        const time = ms(first + i) - ms(first);
        return element(0xa3, [Uint8Array.of(0x81, time >> 8, time & 255, key ? 0x80 : 0), data]);
      }),
    ]));
  }
  const header = element(0x1a45dfa3, [
    number(0x4286, 1), number(0x42f7, 1), number(0x42f2, 4), number(0x42f3, 8),
    text(0x4282, "webm"), number(0x4287, 2), number(0x4285, 2),
  ]);
  const info = element(0x1549a966, [
    number(0x2ad7b1, 1_000_000), float(0x4489, ms(chunks.length)), // ns a tick; duration
    text(0x4d80, "scd"), text(0x5741, "scd"),
  ]);
  const segment = element(0x18538067, [info, element(0x1654ae6b, [track]), ...clusters]);
  return joined([header, segment]);
}

function element(id, parts) {
  const contents = joined(parts);
  const size = new Uint8Array(8); // a length of 8 bytes
  new DataView(size.buffer).setBigUint64(0, (1n << 56n) | BigInt(contents.length));
  return joined([bigEndian(id), size, contents]);
}

function bigEndian(value) {
  const bytes = [];
  for (let rest = value; rest > 0 || !bytes.length; rest = Math.floor(rest / 256)) {
    bytes.unshift(rest % 256);
  }
  return Uint8Array.from(bytes);
}

const number = (id, value) => element(id, [bigEndian(value)]);
const text = (id, value) => element(id, [new TextEncoder().encode(value)]);

function float(id, value) {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setFloat64(0, value);
  return element(id, [bytes]);
}

function joined(parts) {
  const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}
