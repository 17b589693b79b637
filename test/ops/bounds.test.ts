/** No kernel reads or writes past the end of an array, whatever its tensors hold. */
import { afterAll, describe, expect, test } from "vitest";
import { Tape } from "../../src/autograd/tape.ts";
import { isFloat, Tensor } from "../../src/tensor/tensor.ts";
import { scope } from "../../src/tensor/scope.ts";
import { testAdapters } from "../support/adapters.ts";
import { type CheckedDevice, openChecked } from "../support/bounds.ts";
import {
  Draw, flatten, type HostTensor, mapTensors, type OpSamples, type Sample, upload,
} from "./suite.ts";

const [handle] = await testAdapters("own");
const modules = import.meta.glob<{ default: OpSamples | OpSamples[] }>("./*.samples.ts", { eager: true });
const specs = Object.values(modules).flatMap((module) => module.default);

/** Numbers for any tensor of whole numbers: far too large, and just so large that sums of them are. */
const ODD = [-1, -(2 ** 31), 2 ** 31 - 1, 2 ** 30, 4096, 129, 65, 40, 33, 17, 9, 5, 3, 2, 1, 0];
const oddNumbers = (seed: number) => (host: HostTensor): HostTensor => {
  const r = new Draw(seed + host.data.length);
  const odd = () => ODD[Math.floor(r.next() * ODD.length)]!;
  return isFloat(host.dtype) ? host
    : { ...host, data: host.data.map(() => host.dtype === "u32" ? odd() >>> 0 : odd()) };
};
/** What else a tensor may hold. */
const HOLDING: Readonly<Record<string, (host: HostTensor) => HostTensor>> = {
  "as given": (host) => host,
  "no number": (host) => isFloat(host.dtype) ? { ...host, data: host.data.map(() => NaN) } : host,
  "odd numbers": oddNumbers(1), "other odd numbers": oddNumbers(2), "more odd numbers": oddNumbers(3),
};

/** Runs an op forwards and backwards. */
function run(
  { device }: CheckedDevice, spec: OpSamples, sample: Sample, change: (host: HostTensor) => HostTensor,
): void {
  const call = spec.op as unknown as (...args: unknown[]) => Tensor | Tensor[];
  scope(() => {
    const args = sample.args(new Draw(3)).map((arg) => mapTensors(arg, (h) => upload(device, change(h))));
    for (const arg of args) {
      if (spec.op.differentiable && arg instanceof Tensor && isFloat(arg.dtype)) arg.requiresGrad = true;
    }
    const tape = new Tape();
    const outputs = (flatten(tape.run(() => call(...args))) as Tensor[]).filter((y) => y.requiresGrad);
    if (outputs.length === 0) return;
    const seeds = outputs.map((output) => upload(device, change(new Draw(5).normal(output.shape))));
    for (const gradient of tape.backward(outputs, seeds).values()) gradient.release();
  });
}

/** Ops with short kernels, in which what tensors hold decides where they read and write. */
const LIGHT = /^(moe_|embedding$|router_|expert|update_expert|adamw|cache|argmax)/;
/** Ops whose checked kernels compile for a second or more. */
const HEAVY = /^(ssd_|chunk_|(ring_|decode_)?attention|linear_cross_entropy|probabilities|sample)/;
const isAll = process.env["KRAIT_BOUNDS"] === "all";
const isSwiftShader = handle!.info.id === "swiftshader";

/** Whether a sample reads whole numbers, and launches anything: none of its tensors is empty. */
function readsNumbers({ args }: Sample): boolean {
  const hosts: HostTensor[] = [];
  for (const arg of args(new Draw(3))) mapTensors(arg, (host) => hosts.push(host));
  return hosts.some(({ dtype }) => !isFloat(dtype)) && hosts.every(({ data }) => data.length > 0);
}

/**
 * Checked kernels compile slowly: of other ops that read whole numbers one sample will do, and SwiftShader's
 * compiler takes minutes. Indices of the remaining ops follow from shapes alone.
 * KRAIT_BOUNDS=all runs everything, for changes of kernels; lavapipe needs more than half an hour.
 */
function chosen({ op, samples }: OpSamples): readonly Sample[] {
  if (isAll || LIGHT.test(op.opName)) return samples;
  const sample = samples.find(readsNumbers);
  return isSwiftShader || HEAVY.test(op.opName) || !sample ? [] : [sample];
}

const arrangements = [["software", true], ["hardware", false]] as const;
for (const [arrangement, isSoftware] of arrangements.slice(0, isAll ? 2 : 1)) {
  describe(`${handle!.info.id}, arranged as for ${arrangement}`, async () => {
    const checked = await openChecked({ ...handle!, info: { ...handle!.info, isSoftware } });
    afterAll(() => checked.device.destroy());
    for (const spec of specs) {
      if (spec.needs && !checked.device.gpuDevice.features.has(spec.needs)) continue;
      if (chosen(spec).length === 0) continue;
      describe(spec.op.opName, () => {
        for (const sample of chosen(spec)) {
          test(sample.name, async () => {
            const found: string[] = [];
            for (const [what, change] of Object.entries(HOLDING)) {
              run(checked, spec, sample, change);
              for (const line of await checked.violations()) found.push(`${what}: ${line}`);
            }
            expect(found).toEqual([]);
          }, 300_000);
        }
      });
    }
  });
}

test("an index past the end is found, and named", async () => {
  const { device, violations } = await openChecked(handle!);
  const module = device.gpuDevice.createShaderModule({
    label: "a kernel",
    code: `@group(0) @binding(0) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(8)
fn main(@builtin(local_invocation_index) i: u32) {
  var four = vec4u();
  y[i / 2u] = four[i % 4u];
  y[i - 1u + u32(i == 0u) * 2u] = four[i];
}`,
  });
  const { gpuDevice } = device;
  const layout = gpuDevice.createBindGroupLayout({
    entries: [{ binding: 0, visibility: 4, buffer: { type: "storage" } }],
  });
  const pipeline = gpuDevice.createComputePipeline({
    layout: gpuDevice.createPipelineLayout({ bindGroupLayouts: [layout] }), compute: { module },
  });
  const buffer = gpuDevice.createBuffer({ size: 28, usage: 0x80 });
  const encoder = gpuDevice.createCommandEncoder();
  const pass = encoder.beginComputePass();
  pass.setPipeline(pipeline);
  const entries = [{ binding: 0, resource: { buffer } }];
  pass.setBindGroup(0, gpuDevice.createBindGroup({ layout, entries }));
  pass.dispatchWorkgroups(1);
  pass.end();
  gpuDevice.queue.submit([encoder.finish()]);
  expect(await violations()).toEqual([
    expect.stringMatching(/^a kernel, line 6: four\[i\] with index [4-7] of 4$/),
  ]);
  expect(await violations()).toEqual([]);
  device.destroy();
});
