import { provider } from "#gpu";
import { chooseAdapter } from "../../src/gpu/adapters.ts";

export interface Squares {
  ids: string[];
  chosen: string;
  values: number[];
}

/** Squares 0..n-1 on the page's adapter. */
export default async function squares(n: number): Promise<Squares> {
  const handles = await provider.listAdapters();
  const { handle } = chooseAdapter(handles);
  const device = await (await handle.request()).requestDevice();
  const module = device.createShaderModule({
    code: `
      @group(0) @binding(0) var<storage, read_write> values: array<u32>;
      @compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3u) {
        if (id.x < arrayLength(&values)) { values[id.x] = id.x * id.x; }
      }`,
  });
  const pipeline = await device.createComputePipelineAsync({ layout: "auto", compute: { module } });
  const size = 4 * n;
  const values = device.createBuffer({ size, usage: GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC });
  const staging = device.createBuffer({ size, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
  const bindings = device.createBindGroup({
    layout: pipeline.getBindGroupLayout(0),
    entries: [{ binding: 0, resource: { buffer: values } }],
  });
  const encoder = device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  pass.setPipeline(pipeline);
  pass.setBindGroup(0, bindings);
  pass.dispatchWorkgroups(Math.ceil(n / 64));
  pass.end();
  encoder.copyBufferToBuffer(values, 0, staging, 0, size);
  device.queue.submit([encoder.finish()]);
  await staging.mapAsync(GPUMapMode.READ);
  const result = [...new Uint32Array(staging.getMappedRange())];
  device.destroy();
  return { ids: handles.map(({ info }) => info.id), chosen: handle.info.id, values: result };
}
