// Runs quant.h for test_quant.py. `convert in out`: of a file of floats the codes of to_e4m3 and of to_e2m1, one byte
// each, all of one and then all of the other, and after them from_e4m3 of the codes 0 to 127. `rows in out format rows width pitch
// quant_bytes scale_bytes`: in is the given float and then the rows; out gets the bytes of quant and of the scales.
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "quant_rows.h"
#include "simt.h"

using namespace tpfuse;
using quant::Kind;
using quant::Layout;

namespace {

std::vector<float> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  std::vector<float> values(size_t(file.tellg()) / sizeof(float));
  file.seekg(0).read(reinterpret_cast<char*>(values.data()), std::streamsize(values.size() * sizeof(float)));
  return values;
}

void convert(const std::vector<float>& x, std::ofstream& out) {
  for (float v : x) out.put(char(quant::to_e4m3(v)));
  for (float v : x) out.put(char(quant::to_e2m1(v)));
  for (u32 code = 0; code < 128; ++code) {
    float wide = quant::from_e4m3(code);
    out.write(reinterpret_cast<const char*>(&wide), sizeof wide);
  }
}

using Kernel = void (*)(QuantRows);
const std::map<std::string, Kernel> kKernels = {
    {"fp8_static", quantise_rows<Kind::fp8_static, Layout::row_major>},
    {"fp8_per_token", quantise_rows<Kind::fp8_per_token, Layout::row_major>},
    {"fp8_per_group", quantise_rows<Kind::fp8_per_group, Layout::row_major>},
    {"fp8_per_group_column_major", quantise_rows<Kind::fp8_per_group, Layout::column_major>},
    {"fp8_per_group_tma_aligned", quantise_rows<Kind::fp8_per_group, Layout::column_major>},
    {"mxfp8", quantise_rows<Kind::mxfp8, Layout::row_major>},
    {"mxfp8_swizzled", quantise_rows<Kind::mxfp8, Layout::swizzled>},
    {"nvfp4", quantise_rows<Kind::nvfp4, Layout::row_major>},
    {"nvfp4_swizzled", quantise_rows<Kind::nvfp4, Layout::swizzled>},
};

void rows(const std::vector<float>& in, std::ofstream& out, const std::string& format, const std::vector<u32>& sizes) {
  u32 rows = sizes[0], width = sizes[1], quant_bytes = sizes[3], scale_bytes = sizes[4];
  simt::Machine m(1, 7);
  float* x = m.alloc<float>(0, in.size() - 1, "x");
  float* given = m.alloc<float>(0, 1, "given");
  u8* bytes = m.alloc<u8>(0, quant_bytes, "quant");
  u8* scales = m.alloc<u8>(0, scale_bytes, "scales");
  given[0] = in[0];
  std::copy(in.begin() + 1, in.end(), x);
  Kernel kernel = kKernels.at(format);
  u32 threads = (width + 255) / 256 * 32;
  QuantRows p{x, given, bytes, scales, rows, width, sizes[2]};
  m.launch(0, rows, threads, [=] { kernel(p); });
  m.run();
  out.write(reinterpret_cast<const char*>(bytes), quant_bytes);
  out.write(reinterpret_cast<const char*>(scales), scale_bytes);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<float> in = read(argv[2]);
  std::ofstream out(argv[3], std::ios::binary);
  if (std::string(argv[1]) == "convert") {
    convert(in, out);
  } else {
    std::vector<u32> sizes;
    for (int i = 5; i < argc; ++i) sizes.push_back(u32(std::stoul(argv[i])));
    rows(in, out, argv[4], sizes);
  }
}
