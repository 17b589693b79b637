/** gpu.js on its WebGPU backend. It has no ops: these are its users' own kernels, the plainest ones. */
import { createRequire } from "node:module";
import { type Case, FACTOR } from "./cases.ts";
import { offerWebGpu } from "./browser.ts";
import { slope } from "./protocol.ts";
import type { Engine } from "./runner.ts";

/** A result that stays on the GPU. */
interface Handle {
  toArray(): Promise<Float32Array[]>;
  delete?(): void;
}
interface Kernel {
  (...args: unknown[]): Promise<Handle>;
  destroy(): void;
}
interface This {
  readonly thread: { readonly x: number; readonly y: number };
  readonly constants: { readonly size: number; readonly factor: number };
}
interface Gpu {
  createKernel(body: (this: This, ...args: number[][][]) => number, settings: object): Kernel;
}

export async function gpuJsEngine(adapter: string): Promise<Engine> {
  await offerWebGpu(adapter);
  const require = createRequire(import.meta.url);
  const { GPU } = require("gpu.js") as { GPU: new (options: object) => Gpu };
  const gpu = new GPU({ mode: "webgpu" });
  const { version } = require("gpu.js/package.json") as { version: string };
  return {
    version,
    async prepare(wanted: Case) {
      const isProduct = wanted.name === "matmul_f32_512"; // 1024 takes seconds a link on an emulated adapter
      if (!isProduct && wanted.name !== "copy_16m") return null;
      const inputs = wanted.inputs();
      const rows = (name: string): Float32Array[] => {
        const { data, shape: [count, width] } = inputs[name]!;
        return Array.from({ length: count! }, (_, i) => data.subarray(i * width!, (i + 1) * width!));
      };
      const [height, width] = inputs["x"]!.shape as [number, number];
      const settings = {
        output: [width, height], pipeline: true, immutable: true, constants: { size: width, factor: FACTOR },
      };
      const kernel = isProduct
        ? gpu.createKernel(function (a, b) {
          let sum = 0;
          for (let i = 0; i < this.constants.size; i++) {
            sum += a![this.thread.y]![i]! * b![i]![this.thread.x]!;
          }
          return sum;
        }, settings)
        : gpu.createKernel(function (a) {
          return a![this.thread.y]![this.thread.x]! * this.constants.factor;
        }, settings);
      // The first link takes arrays, the others what stays on the GPU.
      const keep = gpu.createKernel(function (a) {
        return a![this.thread.y]![this.thread.x]!;
      }, settings);
      const x = await keep(rows("x"));
      const others = isProduct ? [await keep(rows("w"))] : [];
      const wait = (handle: Handle) => handle.toArray();
      return {
        note: "own kernel; time of n + 1 links less that of 1, over n",
        run: (n) => slope(n, async (links) => {
          const start = performance.now();
          let y = x;
          for (let i = 0; i < links; i++) {
            const next = await kernel(y, ...others);
            if (y !== x) y.delete?.();
            y = next;
          }
          await wait(y);
          if (y !== x) y.delete?.();
          return performance.now() - start;
        }),
        async sample(indices) {
          const y = await kernel(x, ...others);
          const data = await wait(y);
          y.delete?.();
          return indices.map((i) => data[Math.floor(i / width)]![i % width]!);
        },
        dispose() {
          kernel.destroy();
          keep.destroy();
        },
      };
    },
  };
}
