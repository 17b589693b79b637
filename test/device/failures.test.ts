import { describe, expect, test, vi } from "vitest";
import { Tape } from "../../src/autograd/tape.ts";
import { DeviceLostError, GpuError, OutOfMemoryError, ShaderError } from "../../src/gpu/errors.ts";
import { launch } from "../../src/kernel/launch.ts";
import { add, scale } from "../../src/ops/elementwise.ts";
import { linear } from "../../src/ops/linear.ts";
import { rms_norm } from "../../src/ops/rms_norm.ts";
import type { Device } from "../../src/tensor/device.ts";
import { scope } from "../../src/tensor/scope.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { failEveryAllocation } from "../support/failing_allocator.ts";
import { onEveryAdapter } from "../support/devices.ts";

/** Shader texts to use instead of the files, by name. */
const changed = vi.hoisted(() => new Map<string, string>());

vi.mock(import("../../src/kernel/sources.node.ts"), async (original) => {
  const real = await original();
  return { ...real, shaderSource: (name: string) => changed.get(name) ?? real.shaderSource(name) };
});

const isLost = (work: Promise<unknown>) => expect(work).rejects.toBeInstanceOf(DeviceLostError);

/** A chain of sums that keeps a software adapter busy for a while. */
function busy(device: Device) {
  const x = device.tensor(new Float32Array(1 << 18).fill(1), [1 << 18]);
  let sum = x;
  for (let i = 0; i < 100; i++) sum = add(sum, x);
  return sum;
}

/** Some of everything: a forward, a backward, a captured step. Returns what came out, and frees the rest. */
function work(device: Device): Tensor[] {
  return scope(() => {
    const x = device.tensor(Float32Array.from({ length: 60 }, (_, i) => i / 60), [5, 12]);
    const weight = device.tensor(Float32Array.from({ length: 96 }, (_, i) => (i % 7) / 7), [8, 12]);
    const scales = device.tensor(new Float32Array(8).fill(0.5), [8]);
    for (const tensor of [x, weight, scales]) tensor.requiresGrad = true;
    const tape = new Tape();
    try {
      const y = tape.run(() => {
        const h = rms_norm(linear(x, weight, null), scales, 1e-5);
        return add(h, scale(h, 2));
      });
      const dy = device.tensor(new Float32Array(40).fill(1), [5, 8]);
      const gradients = tape.backward([y], [dy]);
      let copy: Tensor;
      try {
        copy = scale(gradients.get(weight.key)!.reshape([8, 12]), 1);
      } finally {
        for (const gradient of gradients.values()) gradient.release();
      }
      const { graph } = device.capture(() => scope(() => y.copyFrom(add(y, y))));
      device.replay(graph);
      device.stream.disposeGraph(graph);
      return [y, copy];
    } finally {
      tape.dispose();
    }
  });
}

await onEveryAdapter((device, open) => {
  describe("device loss", () => {
    test("destroy() while work is pending: every read rejects with DeviceLostError, none hangs", async () => {
      const doomed = await open();
      const sum = busy(doomed);
      const pending = [sum.read(), sum.read(), doomed.finish()];
      doomed.destroy();
      await Promise.all(pending.map(isLost));
      await isLost(sum.read());
      await isLost(doomed.settle());
      expect(() => doomed.zeros([4])).toThrow(DeviceLostError);
      expect(() => add(sum, sum)).toThrow(DeviceLostError);
      expect(doomed.failure).toMatchObject({ reason: "destroyed" });
      doomed.destroy();
    });

    test("a loss that nobody asked for says why", async () => {
      const doomed = await open();
      const sum = busy(doomed);
      await doomed.settle(); // everything is with the driver
      const pending = [sum.read(), doomed.finish()];
      doomed.gpuDevice.destroy();
      await Promise.all(pending.map(isLost));
      expect(doomed.failure?.message).toMatch(/^The GPU device was lost \(\w+\): ./);
    });

    test("a loss while pipelines compile, while a profiler reads, and within a capture", async () => {
      const doomed = await open();
      const profiler = doomed.profile();
      const x = doomed.zeros([64]);
      const { graph } = doomed.capture(() => scope(() => x.copyFrom(scale(x, 2))));
      doomed.replay(graph);
      const pending = x.read();
      doomed.destroy();
      await isLost(pending);
      expect(() => doomed.replay(graph)).toThrow(DeviceLostError);
      doomed.stream.disposeGraph(graph);
      x.dispose();
      await profiler?.settle().catch(() => {});
    });

    test("another device of the same adapter is not affected", async () => {
      const [doomed, other] = [await open(), await open()];
      const sum = busy(other);
      busy(doomed);
      doomed.destroy();
      expect((await sum.read())[0]).toBe(101);
    });
  });

  describe("shader errors", () => {
    test("one in an imported file is reported with that file, the line and the text around it", async () => {
      const fresh = await open();
      const broken = ["// Folding.", "fn workgroup_index(wid: vec3u, nwg: vec3u) -> u32 {", "  return 1.5;",
        "}"];
      changed.set("lib/index", broken.join("\n"));
      try {
        const x = fresh.zeros([4]);
        const error = await add(x, x).read().catch((thrown: unknown) => thrown);
        expect(error).toBeInstanceOf(ShaderError);
        expect((error as Error).message).toMatch(
          /^Shader elementwise\/add\.wgsl \(add; vec4; .*\) did not compile:/);
        expect((error as Error).message).toMatch(/lib\/index\.wgsl:3: cannot convert/);
        expect((error as Error).message).toMatch(/\d+ \| {3}return 1\.5;/);
        expect(() => add(x, x)).toThrow(ShaderError); // the first failure is what every later use reports
      } finally {
        changed.clear();
      }
    });

    test("one in the kernel itself is reported with its own line, comments and imports counted", async () => {
      const fresh = await open();
      const { shaderSource } = await vi.importActual<typeof import("../../src/kernel/sources.node.ts")>(
        "../../src/kernel/sources.node.ts");
      const lines = shaderSource("elementwise/add")!.split("\n");
      const at = lines.findIndex((line) => line.includes("return a[i] + b[i];"));
      lines[at] = "  return a[i] + undefined_name;";
      changed.set("elementwise/add", lines.join("\n"));
      try {
        const x = fresh.zeros([4]);
        await expect(add(x, x).read()).rejects.toThrow(
          `elementwise/add.wgsl:${at + 1}: unresolved value 'undefined_name'`);
      } finally {
        changed.clear();
      }
    });

    test("an override beyond the device's limits is a ShaderError with kernel and constants", async () => {
      const fresh = await open();
      const [x, y] = [fresh.zeros([4]), fresh.zeros([4])];
      launch("elementwise/add", {
        bind: { a: x, b: x, y }, params: { count: 4 }, workgroups: [1],
        constants: { WG: 1_000_000 },
      });
      const error = await y.read().catch((thrown: unknown) => thrown);
      expect(error).toBeInstanceOf(ShaderError);
      expect((error as Error).message).toMatch(
        /elementwise\/add\.wgsl \(add; no conditions; {"WG":1000000}\)/);
    });
  });

  test("a command that the driver refuses is a GpuError at the next use", async () => {
    const fresh = await open();
    const x = fresh.zeros([4]);
    fresh.stream.copy(x.storage, 0, x.storage, 2, 4); // misaligned
    await expect(x.read()).rejects.toBeInstanceOf(GpuError);
  });

  describe("allocations that fail", () => {
    test("at every possible place: a typed error, nothing leaks, and the device goes on", async () => {
      const once = async () => {
        const results = work(device);
        const values = await Promise.all(results.map((tensor) => tensor.read()));
        for (const tensor of results) tensor.dispose();
        return values;
      };
      const expected = await once();
      const failures = await failEveryAllocation(device, async () => expect(await once()).toEqual(expected));
      expect(failures).toBeGreaterThan(15);
    });

    test("under every ceiling the work is done or refused, and nothing leaks", async () => {
      const { pool } = device;
      pool.trim();
      expect(pool.heldBytes).toBe(0);
      let refused = 0;
      for (pool.ceilingBytes = 0; ; pool.ceilingBytes += 256) {
        let results: Tensor[] = [];
        try {
          results = work(device);
        } catch (error) {
          expect(error).toBeInstanceOf(OutOfMemoryError);
          const { requestedBytes, availableBytes } = error as OutOfMemoryError;
          expect(requestedBytes).toBeGreaterThan(0);
          expect(availableBytes).toBeLessThan(512);
          refused++;
        }
        for (const tensor of results) tensor.dispose();
        expect(pool.liveBytes).toBe(0);
        expect(pool.heldBytes).toBeLessThanOrEqual(pool.ceilingBytes);
        if (results.length > 0) break;
      }
      expect(refused).toBeGreaterThan(5);
      pool.ceilingBytes = Infinity;
      await device.finish();
      expect(device.failure).toBeNull();
    });
  });
}, "own");
