/**
 * What the adapter gives at best, measured in the same run as everything that is held against it: the rate
 * of a copy, the rate of a product, the cost of a dispatch. A bound is measured when a case first needs it.
 */
import { scale } from "../../ops/elementwise.ts";
import { linear } from "../../ops/linear.ts";
import { matmul } from "../../ops/matmul.ts";
import type { Tensor } from "../../tensor/tensor.ts";
import type { Bound, Measured } from "./line.ts";
import type { Bench } from "./runner.ts";

/** Elements of f32; read once and written once. */
const COPIES = [1, 4, 16, 64].map((mega) => ({ name: `copy_${mega}m`, elements: mega * 2 ** 20 }));
/** Copies of fewer bytes run from caches and are no ceiling for what does not. */
const OUT_OF_CACHE = 2 ** 27;
/** m, n, k */
const PRODUCTS = [[512, 512, 512], [1024, 1024, 1024], [2048, 512, 512]] as const;
const TINY = 256; // dispatches in a row

export class Ceilings {
  readonly #bench: Bench;
  readonly #best: Partial<Record<Bound, Promise<number>>> = {};

  constructor(bench: Bench) {
    this.#bench = bench;
  }

  /** The best rate found: GB/s read and written for "copy", GFLOP/s for "matmul". */
  of(bound: Bound): Promise<number> {
    return (this.#best[bound] ??= bound === "copy" ? this.#copy() : this.#matmul());
  }

  /** Milliseconds of one tiny dispatch among many. */
  async dispatch(): Promise<void> {
    const bench = this.#bench;
    if (!bench.wants("ceilings", "dispatch")) return;
    const x = bench.tensor([64]);
    const times = await bench.time(() => {
      for (let i = 0; i < TINY; i++) scale(x, 2);
    });
    bench.freeTensors();
    await bench.add({ suite: "ceilings", case: "dispatch", times, unit: "us", work: TINY });
  }

  async #copy(): Promise<number> {
    const bench = this.#bench;
    const limit = Math.min(
      bench.device.gpuDevice.limits.maxBufferSize, bench.device.gpuDevice.limits.maxStorageBufferBindingSize);
    const found: Measured[] = [];
    for (const { name, elements } of COPIES) {
      if (4 * elements > limit) continue;
      bench.working("ceilings", name);
      const [x, y] = [bench.device.zeros([elements]), bench.device.zeros([elements])];
      const add = async (case_: string, body: () => unknown) => found.push({
        suite: "ceilings", case: case_, times: await bench.time(body), unit: "GB/s", work: 8 * elements,
      });
      await add(name, () => scale(x, 1));
      await add(`${name}_buffer`, () => y.copyFrom(x)); // the driver's own copy
      x.dispose();
      y.dispose();
      bench.device.pool.trim();
    }
    const large = ({ work }: Measured) => work >= OUT_OF_CACHE;
    return this.#report(found, found.some(large) ? large : () => true);
  }

  async #matmul(): Promise<number> {
    const bench = this.#bench;
    const found: Measured[] = [];
    for (const [m, n, k] of PRODUCTS) {
      const a = bench.tensor([m, k]);
      const shapes: [string, Tensor, (b: Tensor) => Tensor][] = [
        ["matmul", bench.tensor([k, n]), (b) => matmul(a, b, {})],
        ["linear", bench.tensor([n, k]), (b) => linear(a, b, null)],
      ];
      for (const [op, b, work] of shapes) {
        const name = `${op}_${m}x${n}x${k}`;
        bench.working("ceilings", name);
        const times = await bench.time(() => work(b));
        found.push({ suite: "ceilings", case: name, times, unit: "GFLOP/s", work: 2 * m * n * k });
      }
      bench.freeTensors();
    }
    return this.#report(found, () => true);
  }

  async #report(found: readonly Measured[], counts: (measured: Measured) => boolean): Promise<number> {
    // The fastest run counts: a ceiling is what the adapter can do, not what it does on a busy day.
    const rates = found.map((measured) => (counts(measured) ? measured.work / measured.times[0]! / 1e6 : 0));
    const best = Math.max(...rates);
    for (const [i, measured] of found.entries()) {
      await this.#bench.add({ ...measured, ...(rates[i] === best ? { remark: "the ceiling" } : {}) });
    }
    return best;
  }
}
