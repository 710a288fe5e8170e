// Solve dx/dσ = v(x, σ): what scd.flow.sampler.integrate does.

/**
 * Go from noise at levels[0] to a frame at levels.at(-1).
 *
 * velocity(x, step) resolves to a Float32Array like x; fresh[step] is the noise that the solver
 * `consistency` takes at every step that does not end at 0.
 */
export async function integrate(velocity, noise, levels, solver, fresh = []) {
  let x = noise;
  let last = null;
  let lastSize = 0;
  for (let step = 0; step < levels.length - 1; step++) {
    const [sigma, following] = [levels[step], levels[step + 1]];
    const size = following - sigma;
    const v = await velocity(x, step);
    if (solver === "consistency") {
      x = x.map((value, i) => value - sigma * v[i]);
      if (following > 0) {
        x = x.map((value, i) => (1 - following) * value + following * fresh[step][i]);
      }
    } else if (solver === "multistep" && last) {
      const share = size / (2 * lastSize);
      x = x.map((value, i) => value + size * (v[i] + share * (v[i] - last[i])));
    } else {
      x = x.map((value, i) => value + size * v[i]);
    }
    [last, lastSize] = [v, size];
  }
  return x;
}

/** v = v⁻ + w·(v⁺ − v⁻). */
export function guide(positive, negative, scale) {
  return negative.map((value, i) => value + scale * (positive[i] - value));
}
