import { afterAll, expect, test, vi } from "vitest";
import { GpuError, OutOfMemoryError } from "../../src/gpu/errors.ts";
import { sizeClass } from "../../src/gpu/pool.ts";
import { launch } from "../../src/kernel/launch.ts";
import { pipelinesOf } from "../../src/kernel/pipelines.ts";
import { manifest } from "../../src/kernel/manifest.ts";
import { add, scale } from "../../src/ops/elementwise.ts";
import { scope } from "../../src/tensor/scope.ts";
import { Draw } from "../ops/suite.ts";
import { onEveryAdapter } from "../support/devices.ts";

/** A kernel of two entries without a text: its launches are refused before that is missed. */
const pair = {
  bindings: {
    a: { binding: 0, access: "read" }, b: { binding: 1, access: "read" },
    y: { binding: 2, access: "read_write" }, dst: { binding: 3, access: "read_write" },
  },
  params: { count: "u32" }, overrides: { WG: "u32" }, conditions: [],
  entries: { add: ["a", "b", "params", "y"], set: ["dst", "params"] },
};
Object.assign(manifest, { "test/pair": pair });
afterAll(() => void Reflect.deleteProperty(manifest, "test/pair"));

test("a size class holds what was asked for, wastes little, and is its own class", () => {
  const sizes = [0, 1, 256, 257, 65536, 65537, 1 << 20].map(sizeClass);
  expect(sizes).toEqual([256, 256, 256, 512, 65536, 73728, 1 << 20]);
  const r = new Draw(1);
  for (let i = 0; i < 2000; i++) {
    const bytes = 1 + Math.floor(2 ** (34 * r.next()));
    const size = sizeClass(bytes);
    expect(size).toBeGreaterThanOrEqual(bytes);
    expect(size).toBeLessThanOrEqual(Math.max(256, bytes > 65536 ? 1.125 * bytes : 2 * bytes));
    expect(size % 256).toBe(0);
    expect(sizeClass(size)).toBe(size);
  }
});

await onEveryAdapter((device, open) => {
  test("a freed buffer is used again for its size class, and a live one never", async () => {
    const { pool } = await open();
    const first = pool.allocate(1000);
    const second = pool.allocate(1000);
    expect(second.id).not.toBe(first.id);
    expect({ live: pool.liveBytes, created: pool.created }).toEqual({ live: 2048, created: 2 });
    pool.retain(first);
    pool.release(first);
    expect(pool.allocate(600).id).not.toBe(first.id); // it is still held once
    pool.release(first);
    expect(pool.allocate(513).id).toBe(first.id);
    expect(pool.created).toBe(3);
    for (const buffer of [first, second]) pool.release(buffer);
    expect(() => pool.release(second)).toThrow(/released more often/);
  });

  test("live, held and peak bytes follow allocations; trim gives back what waits", async () => {
    const { pool } = await open();
    const buffers = [256, 4096, 100_000].map((bytes) => pool.allocate(bytes));
    const all = 256 + 4096 + sizeClass(100_000);
    expect([pool.liveBytes, pool.heldBytes, pool.peakBytes]).toEqual([all, all, all]);
    for (const buffer of buffers) pool.release(buffer);
    expect([pool.liveBytes, pool.heldBytes, pool.peakBytes]).toEqual([0, all, all]);
    pool.resetPeak();
    const kept = pool.allocate(200);
    expect(pool.trim()).toBe(all - 256);
    expect([pool.liveBytes, pool.heldBytes, pool.peakBytes]).toEqual([256, 256, 256]);
    pool.release(kept);
    expect(pool.trim()).toBe(256);
    expect(pool.heldBytes).toBe(0);
  });

  test("over the ceiling there is an OutOfMemoryError with both sizes, and work can go on", async () => {
    const small = await open({ poolCeilingBytes: 4096 });
    const tensors = [0, 1, 2].map(() => small.tensor(new Float32Array(256).fill(2), [256])); // 1 KiB each
    let error: unknown = null;
    try {
      small.empty([500]);
    } catch (thrown) {
      error = thrown;
    }
    expect(error).toBeInstanceOf(OutOfMemoryError);
    expect(error).toMatchObject({ requestedBytes: 2000, availableBytes: 1024 });
    expect((error as Error).message).toMatch(/2000 bytes.*1024 bytes are left.*4096 bytes/);
    const sum = add(tensors[0]!, tensors[1]!);
    expect((await sum.read())[255]).toBe(4);
    // What waits in another size class is given up for the new size.
    for (const tensor of [...tensors, sum]) tensor.dispose();
    const large = small.empty([1000]);
    expect(small.pool.heldBytes).toBe(4096);
    large.dispose();
    expect(small.pool.liveBytes).toBe(0);
  });

  test("uploads and readbacks keep every bit, of any size and at an offset", async () => {
    for (const size of [1, 3, 64, 1001]) {
      const words = new Uint32Array(new Draw(size).integers([size], 0, 2 ** 32, "u32").data);
      const tensor = device.tensor(words, [size]);
      expect(await tensor.read()).toEqual(words);
      tensor.dispose();
    }
    const none = device.tensor([], [0, 5]);
    expect(await none.read()).toEqual(new Float32Array(0));
    none.dispose();
    expect(device.pool.liveBytes).toBe(0);
  });

  test("a kernel is compiled once, however often it is launched meanwhile", async () => {
    const fresh = await open();
    const compile = vi.spyOn(fresh.gpuDevice, "createComputePipelineAsync");
    const x = fresh.tensor(new Float32Array(8).fill(1), [8]);
    const sums = scope(() => [add(x, x), add(x, x), scale(x, 3), add(x, x)]);
    expect(compile).toHaveBeenCalledTimes(2);
    expect(pipelinesOf(fresh).size).toBe(2);
    expect((await sums[3]!.read())[7]).toBe(2);
    scope(() => add(x, x));
    await fresh.finish();
    expect(compile).toHaveBeenCalledTimes(2);
    expect(pipelinesOf(fresh).compileMs).toBeGreaterThan(0);
  });

  test("a launch that cannot work is a GpuError that names the kernel and the trouble", async () => {
    const other = await open();
    const [x, y] = [device.zeros([8]), device.zeros([8])];
    const foreign = other.zeros([8]);
    const params = { count: 2 };
    const workgroups = [1] as const;
    const start = (options: object, kernel = "elementwise/add") =>
      launch(kernel as never, { workgroups, params, ...options } as never);
    const refused = (options: object, message: RegExp, kernel?: string) => {
      expect(() => start(options, kernel)).toThrow(GpuError);
      expect(() => start(options, kernel)).toThrow(message);
    };
    refused({ bind: { a: x, b: x } }, /elementwise\/add \(add\) needs a tensor for y/);
    refused({ bind: { a: x, b: x, y, nonsense: y } }, /does not use a binding nonsense/);
    refused({ bind: { a: x, b: x, y: x } }, /elementwise\/add would write a buffer .* bound a second time/);
    refused({ bind: { a: x, b: foreign, y } }, /b lies on another device/);
    refused({ bind: { a: x, b: x, y }, params: {} }, /needs the parameter count/);
    refused({ bind: { a: x, b: x, y }, params: { count: 2, size: 2 } }, /has no parameter size/);
    refused({ bind: { a: x, b: x, y }, constants: { TILE: 4 } }, /has no override TILE/);
    refused({ bind: { a: x, b: x, y }, conditions: ["fast"] }, /has no condition fast/);
    refused({ bind: { a: x, b: x, y }, entry: "subtract" }, /has no entry point subtract/);
    refused({ bind: { a: x, b: x, y } }, /entry points add, set; a launch must name one/, "test/pair");
    const otherEntry = { bind: { a: x, b: x, y, dst: y }, entry: "add" };
    refused(otherEntry, /pair \(add\) does not use a binding dst/, "test/pair");
    refused({ bind: { a: x, b: x, y }, workgroups: [1, 65536] }, /from 0 to 65535, found 65536/);
    for (const bad of [-1, 1.5, NaN, Infinity]) {
      refused({ bind: { a: x, b: x, y }, workgroups: [bad] }, /whole number/);
    }
    for (const tensor of [x, y, foreign]) tensor.dispose();
    expect(device.failure).toBeNull();
  });

  test("a grid beyond 65535 workgroups is folded and reaches every element", async () => {
    const size = 70_000;
    const x = device.tensor(Float32Array.from({ length: size }, (_, i) => i), [size]);
    const y = device.zeros([size]);
    launch("elementwise/add", {
      bind: { a: x, b: x, y }, params: { count: size }, workgroups: [size],
      constants: { WG: 1, EACH: 1 },
    });
    expect(await y.read()).toEqual(Float32Array.from({ length: size }, (_, i) => 2 * i));
    for (const tensor of [x, y]) tensor.dispose();
  });

  test("the profiler's events name kernels and give times that make sense", async () => {
    const timed = await open();
    const profiler = timed.profile();
    expect(profiler !== null).toBe(timed.gpuDevice.features.has("timestamp-query"));
    if (!profiler) return;
    expect(timed.profile()).toBe(profiler);
    const x = timed.tensor(new Float32Array(4096).fill(1), [4096]);
    scope(() => {
      for (let i = 0; i < 70; i++) scale(add(x, x), 2);
    });
    await timed.finish();
    const summary = await profiler.summary();
    expect(summary.map(({ count }) => count)).toEqual([70, 70]);
    for (const { name, totalUs } of summary) {
      expect(name.split(":")[0]! in manifest).toBe(true);
      expect(totalUs).toBeGreaterThan(0);
    }
    for (const { startUs, durationUs, workgroups } of profiler.events) {
      expect(startUs).toBeGreaterThanOrEqual(0);
      expect(durationUs).toBeGreaterThanOrEqual(0);
      expect(workgroups.every((n) => n > 0)).toBe(true);
    }
  });
}, "own");
