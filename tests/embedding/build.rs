fn main() {
    bespoke_kernel_gen::cargo::build_model("../golden/tiny/llama-awq-g32");
}
