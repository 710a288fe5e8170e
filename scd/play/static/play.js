// A stand-in: arrow keys walk, any key ends the pause.
const socket = new WebSocket(`ws://${location.host}/ws${location.search}`);
socket.binaryType = "arraybuffer";
const keys = { ArrowLeft: 1, ArrowRight: 2, ArrowUp: 3 };
let seq = 0;
const send = (message) => socket.send(JSON.stringify(message));
socket.onmessage = ({ data }) => {
  if (typeof data === "string") {
    document.querySelector("#line").textContent = data;
    return;
  }
  const view = new DataView(data);
  const [height, width] = [view.getUint16(4, true), view.getUint16(6, true)];
  const rgb = new Uint8Array(data, 24 + 16, 3 * height * width);
  const image = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    image.data.set([rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2], 255], 4 * i);
  }
  document.querySelector("#picture").getContext("2d").putImageData(image, 0, 0);
  send({ type: "seen", serial: view.getUint32(12, true) });
};
onkeydown = (event) => {
  send({ type: "pause", paused: false });
  if (event.key in keys && !event.repeat) send({ type: "input", action: keys[event.key], seq: ++seq });
};
onkeyup = () => send({ type: "input", action: 0, seq: ++seq });
