/**
 * Initial weights. Every parameter has a random stream of its own,
 * so that a seed means the same weights everywhere.
 */
import { OutOfMemoryError } from "../gpu/errors.ts";
import type { Device } from "../tensor/device.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { fillNormal, fillUniform, type RandomKey } from "../tensor/philox.ts";
import { unscoped } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { type Parameter, listParameters } from "./checkpoint_names.ts";
import type { NemotronHConfig } from "./config.ts";

/**
 * Checks that every parameter can be bound on the device, before anything is drawn or read.
 * @throws OutOfMemoryError naming the first parameter that is too large.
 */
export function checkFits(device: Device, config: NemotronHConfig): void {
  const { maxBufferSize, maxStorageBufferBindingSize } = device.gpuDevice.limits;
  const most = Math.min(maxBufferSize, maxStorageBufferBindingSize);
  const list = listParameters(config);
  for (const { name, shape } of list) {
    const bytes = 4 * sizeOf(shape);
    if (bytes <= most) continue;
    throw new OutOfMemoryError(
      `The model is larger than the device: ${name} [${shape.join(", ")}] takes ${bytes} bytes in f32, but ` +
      `${device.info.id} binds at most ${most}.`, bytes, most);
  }
  const total = list.reduce((sum, { shape }) => sum + 4 * sizeOf(shape), 0);
  if (total > device.pool.ceilingBytes) {
    throw new OutOfMemoryError(
      `The model is larger than the device: its parameters take ${total} bytes in f32, but the memory pool ` +
      `may hold at most ${device.pool.ceilingBytes}.`, total, device.pool.ceilingBytes);
  }
}

/**
 * Draws all parameters of a model (Nemotron-H report, section 2; Mamba-2 reference for the state space):
 * normal weights of deviation `initializer_range`, those that write into the residual stream divided by
 * sqrt(layers); conv weights uniform in 1/sqrt(window); A in 1..16; steps log-uniform between time_step_min
 * and time_step_max; D and norms 1; biases 0.
 * @returns by canonical name; trainable ones require a gradient
 * @throws OutOfMemoryError when the model is larger than the device
 */
export function createParameters(device: Device, config: NemotronHConfig, seed: number): Map<string, Tensor> {
  checkFits(device, config);
  return unscoped(() => new Map(listParameters(config).map((parameter, i) => {
    const tensor = device.tensor(
      initialValues(config, parameter, { seed, stream: i, step: 0 }), parameter.shape);
    tensor.requiresGrad = parameter.trainable;
    return [parameter.name, tensor];
  })));
}

function initialValues(
  config: NemotronHConfig, { name, kind, shape }: Parameter, key: RandomKey,
): Float32Array {
  const values = new Float32Array(sizeOf(shape));
  const uniform = (low: number, high: number) => fillUniform(key, values).map((u) => low + (high - low) * u);
  switch (kind) {
    case "norm":
      return values.fill(1);
    case "router_bias":
      return values;
    case "conv":
      return uniform(-1 / Math.sqrt(config.conv_kernel), 1 / Math.sqrt(config.conv_kernel));
    case "bias":
      return name.endsWith("conv1d.bias")
        ? uniform(-1 / Math.sqrt(config.conv_kernel), 1 / Math.sqrt(config.conv_kernel)) : values;
    case "ssm": {
      if (name.endsWith(".D")) return values.fill(1);
      if (name.endsWith(".A_log")) return uniform(1, 16).map(Math.log);
      const { time_step_min, time_step_max, time_step_floor } = config;
      // The inverse of softplus, so that a step starts at the drawn value.
      return uniform(Math.log(time_step_min), Math.log(time_step_max)).map((log) => {
        const dt = Math.max(Math.exp(log), time_step_floor);
        return dt + Math.log(-Math.expm1(-dt));
      });
    }
    default: {
      const writes = /(?:out_proj|o_proj|down_proj|fc2_latent_proj)(?:\.weight)?$/.test(name);
      const layers = config.num_hidden_layers;
      const deviation =
        config.initializer_range / (writes && config.rescale_prenorm_residual ? Math.sqrt(layers) : 1);
      return fillNormal(key, values).map((x) => deviation * x);
    }
  }
}
