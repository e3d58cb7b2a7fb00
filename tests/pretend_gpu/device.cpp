// A pretended CUDA device for a build of PyTorch without CUDA: "cuda" tensors lie in CPU memory, and CPU kernels compute them.
//
// A fallback for the dispatch key CUDA makes CPU tensors over the same memory, calls the CPU kernel, and turns its results into "cuda"
// tensors. It fails where a real device fails: tensors on two devices, and memory above a limit. Every operation that would make the CPU
// wait for the device is reported to a callback.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>

namespace {

using c10::IValue;

// Memory: every storage on the device counts

std::atomic<int64_t> allocated{0}, peak{0}, limit{int64_t(1) << 50};

int64_t rounded(int64_t bytes) {
  return (bytes + 511) / 512 * 512;  // as CUDA's caching allocator
}

void take(int64_t bytes) {
  int64_t now = allocated += rounded(bytes);
  if (now > limit) {
    allocated -= rounded(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes (pretended device)");
  }
  int64_t most = peak;
  while (now > most && !peak.compare_exchange_weak(most, now)) {
  }
}

struct Owned {  // memory of a storage on the device: it belongs to a CPU storage
  c10::intrusive_ptr<c10::StorageImpl> storage;
  int64_t bytes;
};

void release(void* context) {
  auto* owned = static_cast<Owned*>(context);
  allocated -= rounded(owned->bytes);
  delete owned;
}

const c10::Device DEVICE(c10::DeviceType::CUDA, 0);

c10::DataPtr device_memory(c10::intrusive_ptr<c10::StorageImpl> cpu) {
  int64_t bytes = cpu->nbytes();
  take(bytes);
  void* data = cpu->mutable_data();
  return c10::DataPtr(data, new Owned{std::move(cpu), bytes}, &release, DEVICE);
}

c10::intrusive_ptr<c10::StorageImpl> device_storage(c10::intrusive_ptr<c10::StorageImpl> cpu) {
  size_t bytes = cpu->nbytes();
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, device_memory(std::move(cpu)), c10::GetCPUAllocator(), /*resizable=*/true);
}

// Reports to Python

void (*callback)(const char*, const char*) = nullptr;

std::atomic<bool> capturing{false};

void report(const char* kind, const std::string& name) {
  if (callback != nullptr) callback(kind, name.c_str());
  TORCH_CHECK(
      !capturing || std::strcmp(kind, "wait") != 0, "CUDA error: operation not permitted when stream is capturing (pretended device: ", name, ")");
}

// Device and its properties

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

std::mutex pinned_lock;
std::set<std::pair<const char*, const char*>> pinned;  // [start, end)

struct Pinned final : c10::Allocator {
  static void free(void* context) {
    auto* memory = static_cast<c10::DataPtr*>(context);
    {
      std::lock_guard<std::mutex> lock(pinned_lock);
      for (auto it = pinned.begin(); it != pinned.end(); ++it) {
        if (it->first == static_cast<const char*>(memory->get())) {
          pinned.erase(it);
          break;
        }
      }
    }
    delete memory;
  }
  c10::DataPtr allocate(size_t bytes) override {
    auto* memory = new c10::DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    const char* start = static_cast<const char*>(memory->get());
    std::lock_guard<std::mutex> lock(pinned_lock);
    if (start != nullptr) pinned.insert({start, start + bytes});
    return c10::DataPtr(memory->get(), memory, &Pinned::free, c10::Device(c10::DeviceType::CPU));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override { default_copy_data(target, source, bytes); }
};

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_lock);
  const char* at = static_cast<const char*>(data);
  for (const auto& [start, end] : pinned) {
    if (start <= at && at < end) return true;
  }
  return false;
}

struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  c10::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static Pinned allocator;
    return &allocator;
  }
  c10::Allocator* getCUDADeviceAllocator() const override { return c10::GetCPUAllocator(); }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// A build without CUDA never calls CUDA its accelerator: that is decided when PyTorch is compiled. Autograd asks for it. So the code of this
// one function is replaced in memory: it returns optional(DeviceType::CUDA).
void name_the_accelerator() {
#if defined(__x86_64__)
  const unsigned char code[] = {0xF3, 0x0F, 0x1E, 0xFA, 0xB8, 0x01, 0x01, 0x00, 0x00, 0xC3};  // endbr64; mov eax, 0x0101; ret
  auto* function = reinterpret_cast<char*>(&at::accelerator::getAccelerator);
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  auto* start = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(function) / page * page);
  const size_t size = function + sizeof(code) - start;
  if (mprotect(start, size, PROT_READ | PROT_WRITE | PROT_EXEC) == 0) {
    std::memcpy(function, code, sizeof(code));
    mprotect(start, size, PROT_READ | PROT_EXEC);
  }
#endif
}

// Kernels

at::Tensor cpu_over(const at::Tensor& tensor, const c10::intrusive_ptr<c10::StorageImpl>& storage) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

struct Call {
  // Device storages of the arguments, and the CPU storages over their memory.
  std::unordered_map<c10::StorageImpl*, c10::intrusive_ptr<c10::StorageImpl>> cpu;
  std::unordered_map<c10::StorageImpl*, c10::intrusive_ptr<c10::StorageImpl>> device;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // (device tensor, CPU tensor)
  bool has_cpu = false, has_device = false;
  std::string cpu_shape;

  at::Tensor to_cpu(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() == c10::DeviceType::CPU) {
      if (tensor.dim() > 0) {
        has_cpu = true;
        cpu_shape = c10::str(tensor.sizes());
      }
      return tensor;
    }
    if (tensor.device().type() != c10::DeviceType::CUDA) return tensor;
    has_device = true;
    for (auto& [known, made] : pairs) {
      if (known.is_same(tensor)) return made;
    }
    auto* own = tensor.storage().unsafeGetStorageImpl();
    auto found = cpu.find(own);
    if (found == cpu.end()) {
      auto* keep = new c10::Storage(tensor.storage());
      c10::DataPtr data(own->mutable_data(), keep, [](void* context) { delete static_cast<c10::Storage*>(context); }, c10::Device(c10::kCPU));
      auto made = c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), own->nbytes(), std::move(data), c10::GetCPUAllocator(), true);
      device.emplace(made.get(), c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(own));
      found = cpu.emplace(own, std::move(made)).first;
    }
    at::Tensor made = cpu_over(tensor, found->second);
    pairs.emplace_back(tensor, made);
    return made;
  }

  // An argument may have got another size, and with it other memory.
  void written_back() {
    for (auto& [tensor, made] : pairs) {
      auto* impl = tensor.unsafeGetTensorImpl();
      auto* own = tensor.storage().unsafeGetStorageImpl();
      auto* now = made.storage().unsafeGetStorageImpl();
      if (now->data() != own->data() || now->nbytes() != own->nbytes()) {
        if (now->data() != own->data()) {
          size_t bytes = now->nbytes();
          auto fresh = c10::make_intrusive<c10::StorageImpl>(
              c10::StorageImpl::use_byte_size_t(), bytes, now->set_data_ptr(c10::DataPtr(nullptr, c10::Device(c10::kCPU))),
              c10::GetCPUAllocator(), true);
          own->set_data_ptr_noswap(device_memory(std::move(fresh)));
          own->set_nbytes(bytes);
        }
      }
      if (made.sizes() != tensor.sizes() || made.strides() != tensor.strides()) {
        impl->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
      }
    }
  }

  at::Tensor to_device(const at::Tensor& made) {
    if (!made.defined() || made.device().type() != c10::DeviceType::CPU) return made;
    for (auto& [tensor, known] : pairs) {
      if (known.is_same(made)) return tensor;
    }
    auto* own = made.storage().unsafeGetStorageImpl();
    auto found = device.find(own);
    c10::intrusive_ptr<c10::StorageImpl> storage;
    if (found != device.end()) {
      storage = found->second;
    } else {
      storage = device_storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(own));
      device.emplace(own, storage);
    }
    at::Tensor result;
    for (auto& [tensor, known] : pairs) {
      // As on other devices, a view has the keys of its base: in the inference mode, a view of a normal tensor is a normal tensor.
      if (!result.defined() && tensor.storage().unsafeGetStorageImpl() == storage.get()) {
        result = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(storage), tensor.key_set(), made.dtype());
      }
    }
    if (!result.defined()) {
      result = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), made.dtype());
    }
    result.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
    return result;
  }
};

IValue converted(const IValue& value, const std::function<at::Tensor(const at::Tensor&)>& convert) {
  if (value.isTensor()) return convert(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& tensor : value.toTensorList()) made.push_back(convert(tensor));
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> made;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
      made.push_back(tensor.has_value() ? std::optional<at::Tensor>(convert(*tensor)) : std::nullopt);
    }
    return made;
  }
  return value;
}

const std::unordered_set<std::string> WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"};
// Indices may lie on the CPU; they are copied.
const std::unordered_set<std::string> TAKES_CPU_INDICES = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};
// Random numbers: a recording would repeat them unless the generator is registered.
const std::unordered_set<std::string> RANDOM = {
    "aten::normal_", "aten::uniform_", "aten::random_", "aten::bernoulli_", "aten::multinomial", "aten::exponential_", "aten::native_dropout",
    "aten::randperm", "aten::bernoulli"};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const size_t number = schema.arguments().size();
  Call call;
  bool names_device = false;
  auto arguments = torch::jit::pop(*stack, number);
  for (size_t index = 0; index < number; ++index) {
    IValue value = converted(arguments[index], [&](const at::Tensor& tensor) { return call.to_cpu(tensor); });
    if (value.isDevice() && value.toDevice().type() == c10::DeviceType::CUDA) {
      names_device = true;
      value = c10::Device(c10::kCPU);
    }
    if (value.isGenerator()) value = at::detail::getDefaultCPUGenerator();
    stack->push_back(std::move(value));
  }
  if (call.has_cpu && call.has_device) {
    TORCH_CHECK(
        TAKES_CPU_INDICES.count(name) > 0, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
        name, ", a tensor on the CPU of sizes ", call.cpu_shape, ")");
    report("wait", name + " with indices on the CPU");
  }
  if (WAITS.count(name) > 0) report("wait", name);
  if (RANDOM.count(name) > 0) report("random", name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.written_back();
  auto results = torch::jit::pop(*stack, schema.returns().size());
  for (IValue& result : results) {
    bool moves = call.has_device || names_device;
    stack->push_back(moves ? converted(result, [&](const at::Tensor& tensor) { return call.to_device(tensor); }) : result);
  }
}

// Copies are the only operation between devices.
at::Tensor& copied(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  bool to_device = self.is_cuda(), from_device = source.is_cuda();
  if (to_device != from_device) {
    const at::Tensor& on_cpu = to_device ? source : self;
    bool waits = !(non_blocking && on_cpu.is_pinned()) && on_cpu.numel() > 0;
    if (waits) report("wait", to_device ? "a copy from pageable memory to the device" : "a copy to the CPU");
  }
  Call call;
  at::Tensor target = call.to_cpu(self), origin = call.to_cpu(source);
  target.copy_(origin, false);
  call.written_back();
  return self;
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("copy_", &copied);
}

}  // namespace

extern "C" {
bool pretend_begin() {
  name_the_accelerator();
  return at::accelerator::getAccelerator(false) == c10::DeviceType::CUDA;
}
void pretend_callback(void (*function)(const char*, const char*)) { callback = function; }
int64_t pretend_allocated() { return allocated; }
int64_t pretend_peak() { return peak; }
void pretend_reset_peak() { peak = allocated.load(); }
void pretend_limit(int64_t bytes) { limit = bytes; }
int64_t pretend_limit_now() { return limit; }
void pretend_capturing(bool now) { capturing = now; }
int64_t pretend_uses(void* storage) {
  return c10::raw::intrusive_ptr::use_count(static_cast<c10::StorageImpl*>(storage));
}
}
