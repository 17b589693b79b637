/**
 * Prints for every adapter what a kernel finds right behind the four numbers that are bound: the fifth of the
 * buffer where nobody checks indices, one of the four or 0 where the driver does.
 */
import { provider } from "#gpu";
import { testAdapters } from "./adapters.ts";

await provider.listAdapters(); // and with them the constants
for (const { info, request } of await testAdapters()) {
  const device = await (await request()).requestDevice();
  const module = device.createShaderModule({
    code: `@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(1) fn main() { y[0] = x[y[1]]; }`,
  });
  const pipeline = device.createComputePipeline({ layout: "auto", compute: { module } });
  const { STORAGE, COPY_SRC, COPY_DST, MAP_READ } = GPUBufferUsage;
  const x = device.createBuffer({ size: 256, usage: STORAGE | COPY_DST });
  const y = device.createBuffer({ size: 16, usage: STORAGE | COPY_DST | COPY_SRC });
  const copy = device.createBuffer({ size: 16, usage: MAP_READ | COPY_DST });
  device.queue.writeBuffer(x, 0, Uint32Array.from({ length: 64 }, (_, i) => 100 + i));
  device.queue.writeBuffer(y, 0, Uint32Array.of(0, 4, 0, 0));
  const encoder = device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  pass.setPipeline(pipeline);
  pass.setBindGroup(0, device.createBindGroup({
    layout: pipeline.getBindGroupLayout(0),
    entries: [
      { binding: 0, resource: { buffer: x, offset: 0, size: 16 } }, { binding: 1, resource: { buffer: y } },
    ],
  }));
  pass.dispatchWorkgroups(1);
  pass.end();
  encoder.copyBufferToBuffer(y, 0, copy, 0, 16);
  device.queue.submit([encoder.finish()]);
  await copy.mapAsync(GPUMapMode.READ);
  console.log(`${info.id} ${new Uint32Array(copy.getMappedRange())[0]}`);
  device.destroy();
}
