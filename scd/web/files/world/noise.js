// The noise of a frame: the numbers that torch's generator on the CPU draws for the same seed.
//
// Up to rounding: torch's vectorized logarithm, sine and cosine differ in the last bits.

/** MT19937, seeded as torch seeds it: with the lower 32 bits of the seed. */
export class Generator {
  #state = new Uint32Array(624);
  #next = 624;

  constructor(seed) {
    const s = this.#state;
    s[0] = seed;
    for (let i = 1; i < 624; i++) {
      const before = s[i - 1] ^ (s[i - 1] >>> 30);
      s[i] = Math.imul(1812433253, before) + i;
    }
  }

  /** Draw a number of 32 bits. */
  bits() {
    if (this.#next === 624) this.#twist();
    let y = this.#state[this.#next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  /** Draw `count` >= 16 standard normal numbers, as torch.randn does: Box and Muller's, in 16s. */
  normal(count) {
    const numbers = new Float32Array(count);
    const uniform = () => (this.bits() & 0xffffff) / 0x1000000;
    for (let i = 0; i < count; i++) numbers[i] = uniform();
    let first = 0;
    for (; first + 16 <= count; first += 16) transform(numbers, first);
    if (first < count) { // the last 16 are drawn again
      for (let i = count - 16; i < count; i++) numbers[i] = uniform();
      transform(numbers, count - 16);
    }
    return numbers;
  }

  #twist() {
    const s = this.#state;
    for (let i = 0; i < 624; i++) {
      const y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
      s[i] = s[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.#next = 0;
  }
}

function transform(numbers, first) {
  for (let i = first; i < first + 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - numbers[i]));
    const angle = 2 * Math.PI * numbers[i + 8];
    numbers[i] = radius * Math.cos(angle);
    numbers[i + 8] = radius * Math.sin(angle);
  }
}

/** The generator of a frame in play: scd.utils.seeding.generator("cpu", "play", seed, number). */
export async function frameGenerator(seed, number) {
  const key = new TextEncoder().encode(`('play', ${seed}, ${number})`);
  const digest = new DataView(await crypto.subtle.digest("SHA-256", key));
  // The first 64 bits, shifted right by one; of these the lower 32.
  return new Generator(((digest.getUint32(4) >>> 1) | (digest.getUint32(0) << 31)) >>> 0);
}
