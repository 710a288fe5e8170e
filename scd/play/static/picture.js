// Read picture messages (the layout is in scd/play/README.md), and paint them on a canvas.

const HEADER = 24;
const WORLD_HEADER = 16;
const AGAIN = 2;
const OVER = 1;

/** Read a picture message: its frame and, for each shown world, times (ms) and RGB bytes. */
export function readPicture(buffer) {
  const view = new DataView(buffer);
  const height = view.getUint16(4, true);
  const width = view.getUint16(6, true);
  const size = 3 * height * width;
  const worlds = [];
  for (let i = 0, at = HEADER; i < view.getUint8(1); i++, at += WORLD_HEADER + size) {
    worlds.push({
      world: view.getUint8(at),
      over: (view.getUint8(at + 1) & OVER) !== 0,
      times: [4, 8, 12].map((offset) => view.getFloat32(at + offset, true)),
      image: { width, height, rgb: new Uint8Array(buffer, at + WORLD_HEADER, size) },
    });
  }
  return {
    action: view.getUint8(2),
    again: (view.getUint8(3) & AGAIN) !== 0,
    frame: view.getUint32(8, true),
    serial: view.getUint32(12, true),
    seq: view.getUint32(16, true),
    worlds,
  };
}

/** Paint an image on a canvas, after resizing the canvas to it. */
export function paint(canvas, { width, height, rgb }) {
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const data = new ImageData(width, height);
  const rgba = data.data;
  for (let from = 0, to = 0; from < rgb.length; from += 3, to += 4) {
    rgba[to] = rgb[from];
    rgba[to + 1] = rgb[from + 1];
    rgba[to + 2] = rgb[from + 2];
    rgba[to + 3] = 255;
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
}
