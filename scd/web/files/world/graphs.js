// The three graphs in onnxruntime-web: by WebGPU where the browser has it, else by WASM.

import { product } from "./world.js";

const MOST_THREADS = 4; // more wait for each other longer than they work
// What the encoder makes, and graphs take.
const STAYS_ON_GPU = {
  context: "gpu-buffer", perturbed: "gpu-buffer", new_keys: "gpu-buffer", new_values: "gpu-buffer",
};

/**
 * Choose what computes: "webgpu" or "wasm"; `wanted` (or null) overrules. A GPU that is a program
 * on the CPU is slower than WASM: only if it is wanted.
 */
export async function chooseBackend(wanted) {
  if (wanted === "wasm") return wanted;
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (wanted === "webgpu" && !adapter) throw new Error("this browser has no WebGPU");
  return adapter && (wanted || !adapter.info.isFallbackAdapter) ? "webgpu" : "wasm";
}

/** Files of the runtime for a backend. */
export function runtimeFiles(backend) {
  const kind = backend === "webgpu" ? ".asyncify" : "";
  return {
    script: `ort/ort.${backend}.min.mjs`,
    mjs: `ort/ort-wasm-simd-threaded${kind}.mjs`,
    wasm: `ort/ort-wasm-simd-threaded${kind}.wasm`,
  };
}

export class Graphs {
  #ort;
  #sessions = {};
  #shapes;
  #noPerturbation;

  /**
   * Load the runtime and the graphs. `file(name)` resolves to a file's bytes, `url(name)` gives its
   * address; `shapes` are those of the manifest.
   */
  static async load({ backend, file, url, shapes }) {
    const graphs = new Graphs();
    const { script, mjs, wasm } = runtimeFiles(backend);
    const ort = (graphs.#ort = await import(url(script)));
    // Without the headers of cross-origin isolation, no memory is shared between threads.
    const threads = self.crossOriginIsolated ? navigator.hardwareConcurrency || 1 : 1;
    ort.env.wasm.numThreads = graphs.threads = Math.min(MOST_THREADS, threads);
    ort.env.wasm.wasmPaths = { mjs: url(mjs), wasm: url(wasm) };
    ort.env.wasm.wasmBinary = (await file(wasm)).buffer;
    ort.env.logLevel = "error";
    const stays = backend === "webgpu" ? { preferredOutputLocation: STAYS_ON_GPU } : {};
    for (const name of ["encoder", "decoder", "picture"]) {
      graphs.#sessions[name] = await ort.InferenceSession.create(await file(`graphs/${name}.onnx`), {
        executionProviders: [backend],
        graphOptimizationLevel: "all",
        ...(name === "encoder" ? stays : {}),
      });
    }
    graphs.backend = backend;
    graphs.#shapes = shapes;
    graphs.#noPerturbation = new Float32Array(product(shapes.context));
    return graphs;
  }

  emptyCache() {
    return this.#tensor(new Float32Array(product(this.#shapes.cache)), this.#shapes.cache);
  }

  /** Give memory of the GPU back. */
  free(...tensors) {
    for (const tensor of tensors) if (tensor?.location === "gpu-buffer") tensor.dispose();
  }

  /** See scd.web.graphs.EncoderStep; `dispose()` frees the contexts. */
  async encode({ latents, action, cosines, sines, slot, held, keys, values, perturbation }) {
    const { context, perturbed, new_keys, new_values } = await this.#sessions.encoder.run({
      latents: this.#tensor(latents, this.#shapes.latents),
      action: this.#number(action),
      cosines: this.#tensor(cosines, [1, cosines.length]),
      sines: this.#tensor(sines, [1, sines.length]),
      slot: this.#number(slot),
      held: this.#number(held),
      keys,
      values,
      perturbation: this.#tensor(perturbation ?? this.#noPerturbation, this.#shapes.context),
    });
    const dispose = () => this.free(context, perturbed);
    return { context, perturbed, keys: new_keys, values: new_values, dispose };
  }

  /** See scd.web.graphs.DecoderStep. */
  async decode(noisy, context, action, level) {
    const { velocity } = await this.#sessions.decoder.run({
      noisy: this.#tensor(noisy, this.#shapes.latents),
      context,
      action: this.#number(action),
      level: this.#number(level),
    });
    return velocity.getData();
  }

  /** See scd.web.graphs.PictureDecoder: RGB bytes. */
  async picture(latents) {
    const { picture } = await this.#sessions.picture.run({
      latents: this.#tensor(latents, this.#shapes.latents),
    });
    return Uint8Array.from(await picture.getData());
  }

  #tensor(data, shape) {
    return new this.#ort.Tensor("float32", data, shape);
  }

  #number(value) {
    return new this.#ort.Tensor("int32", Int32Array.of(value), [1]);
  }
}
