// wgsl_reflect 1.6.0 types its CommonJS entry only; Node needs the module file.
declare module "wgsl_reflect/wgsl_reflect.module.js" {
  export * from "wgsl_reflect";
}
