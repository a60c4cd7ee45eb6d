"""Every word that may pass: value sets of code strings, makers, words of descriptions.

A code string (CS) is 16 letters that anybody can fill with anything, so it passes only with a value that the standard
(PS3.3, PS3.16) or common practice gives it. `profile.py` explains the tables that use these.
"""

from collections.abc import Mapping
from types import MappingProxyType


def _sets(text: str) -> Mapping[str, frozenset[str]]:
    """Lines of `keyword[, keyword] = value | value`; further values of a keyword on an indented line."""
    found: dict[str, frozenset[str]] = {}
    for line in text.strip().replace("\n    ", " ").splitlines():
        keywords, values = line.split(" = ")
        for keyword in keywords.split(", "):
            found[keyword] = frozenset(value.strip() for value in values.split("|"))
    return MappingProxyType(found)


CODES: Mapping[str, frozenset[str]] = _sets("""
PatientSex = M | F | O
Modality = CR | CT | DX | ES | GM | IO | IVUS | MG | MR | NM | OP | OPT | OT | PT | PX | RF | RG | SC | SM | US | XA
    | XC
BodyPartExamined = ABDOMEN | ABDOMENPELVIS | ADRENAL | ANKLE | ANUS | AORTA | ARM | AXILLA | BACK | BILEDUCT
    | BLADDER | BODY | BONE | BRACHIALPLEXUS | BRAIN | BREAST | BRONCHUS | BUTTOCK | CALCANEUS | CALF | CAROTID
    | CEREBELLUM | CERVIX | CHEEK | CHEST | CHESTABDOMEN | CHESTABDPELVIS | CIRCLEOFWILLIS | CLAVICLE | COCCYX
    | COLON | CORNEA | CSPINE | CTSPINE | DUODENUM | EAR | ELBOW | ESOPHAGUS | EXTREMITY | EYE | EYELID | FACE
    | FEMUR | FINGER | FOOT | FOREARM | GALLBLADDER | HAND | HEAD | HEADNECK | HEART | HIP | HUMERUS | ILEUM | ILIUM
    | IAC | JAW | JEJUNUM | KIDNEY | KNEE | LARYNX | LEG | LIVER | LSPINE | LSSPINE | LUMBARSPINE | LUNG | MANDIBLE
    | MAXILLA | MEDIASTINUM | MOUTH | NECK | NECKCHEST | NECKCHESTABDOMEN | NECKCHESTABDPELV | NOSE | OPTICCANAL
    | ORBIT | OVARY | PANCREAS | PAROTID | PATELLA | PELVIS | PENIS | PHARYNX | PITUITARY | PROSTATE | RADIUS
    | RECTUM | RIB | SACRUM | SCALP | SCAPULA | SCLERA | SCROTUM | SELLA | SHOULDER | SIJOINT | SINUS | SKULL
    | SPINALCORD | SPINE | SPLEEN | SSPINE | STERNUM | STOMACH | TEMPORALBONE | TESTIS | THIGH | THORAX | THUMB
    | THYMUS | THYROID | TIBIAFIBULA | TLSPINE | TMJ | TOE | TONGUE | TRACHEA | TSPINE | ULNA | URETER | URETHRA
    | UTERUS | VAGINA | VULVA | WHOLEBODY | WHOLE BODY | WRIST | ZYGOMA
PatientPosition = HFP | HFS | HFDR | HFDL | FFDR | FFDL | FFP | FFS | LFP | LFS | RFP | RFS | AFDR | AFDL | PFDR
    | PFDL
Laterality, ImageLaterality, FrameLaterality = R | L | U | B
ViewPosition = AP | PA | LL | RL | RLD | LLD | RLO | LLO | LAT | LATERAL | CC | MLO | ML | LM | LMO | LMD | XCC
    | XCCL | XCCM | FB | SIO | ISO | AXIAL | OBL | OBLIQUE
BurnedInAnnotation, RecognizableVisualFeatures = YES | NO
LossyImageCompression = 00 | 01
LossyImageCompressionMethod = ISO_10918_1 | ISO_14495_1 | ISO_15444_1 | ISO_15444_15 | ISO_13818_2 | ISO_14496_10
    | ISO_23008_2
PresentationLUTShape = IDENTITY | INVERSE | LIN OD
PixelIntensityRelationship = LIN | LOG | DISP | FILM | OTHER
RescaleType = HU | OD | US | MGML | Z_EFF | ED | EDW | HU_MOD | PCT
ModalityLUTType = HU | OD | US | MGML | Z_EFF | ED | EDW | HU_MOD | PCT
VOILUTFunction = LINEAR | LINEAR_EXACT | SIGMOID
ScanningSequence = SE | IR | GR | EP | RM
SequenceVariant = SK | MTC | SS | TRSS | SP | MP | OSP | NONE | OTHER
ScanOptions = PER | RG | CG | PPG | FC | PFF | PFP | SP | FS | OTHER
MRAcquisitionType = 1D | 2D | 3D
CollimatorType = NONE | RING | PARA | PINH | FANB | CONE | SLNT | ASTG | DIVG
CorrectedImage = DECY | ATTN | SCAT | DTIM | MOTN | PMOT | CLIN | RAN | RADL | DCAL | NORM | UNIF | COR | NRGY | LIN
    | BKGR | 3SCT
SeriesType = STATIC | DYNAMIC | GATED | WHOLE BODY | IMAGE | REPROJECTION
Units = CNTS | NONE | CM2 | CM2ML | PCNT | CPS | BQML | MGMINML | UMOLMINML | MLMING | MLG | 1CM | UMOLML | PROPCNTS
    | PROPCPS | MLMINML | MLML | GML | STDDEV | SUV
CountsSource = EMISSION | TRANSMISSION
ReprojectionMethod = SUM | MAX PIXEL
DecayCorrection = NONE | START | ADMIN
PresentationIntentType = FOR PRESENTATION | FOR PROCESSING
PositionerType = CARM | COLUMN | MAMMOGRAPHIC | PANORAMIC | CEPHALOSTAT | RIGID | NONE
DetectorType = DIRECT | SCINTILLATOR | STORAGE | FILM
BreastImplantPresent = YES | NO
ConstantVolumeFlag = YES | NO
FluoroscopyFlag = YES | NO
MultipleSpinEcho = YES | NO
MultiPlanarExcitation = YES | NO
PhaseContrast = YES | NO
EchoPlanarPulseSequence = YES | NO
SaturationRecovery = YES | NO
InversionRecovery = YES | NO
T2Preparation = YES | NO
ParallelAcquisition = YES | NO
PartialFourier = YES | NO
BloodSignalNulling = YES | NO
QuadratureReceiveCoil = YES | NO
TimeOfFlightContrast = YES | NO
OrganExposed = BREAST
ConversionType = DV | DI | DF | WSD | SD | SI | DRW | SYN
RadiationSetting = SC | GR
PositionerMotion = STATIC | DYNAMIC
TypeOfDetectorMotion = NONE | STEP AND SHOOT | CONTINUOUS | ACQ DURING STEP | WOBBLE | CLAMSHELL
SliceProgressionDirection = APEX_TO_BASE | BASE_TO_APEX | ANT_TO_INF | INF_TO_ANT
FieldOfViewShape = RECTANGLE | ROUND | HEXAGONAL
RotationDirection = CW | CC
ContentQualification = PRODUCT | RESEARCH | SERVICE
DimensionOrganizationType = 3D | 3D_TEMPORAL | TILED_FULL | TILED_SPARSE
RespiratoryCyclePosition = START_RESPIR | END_RESPIR | UNDETERMINED
CardiacCyclePosition = END_SYSTOLE | END_DIASTOLE | UNDETERMINED
CardiacSynchronizationTechnique = NONE | REALTIME | PROSPECTIVE | RETROSPECTIVE | PACED
RespiratoryMotionCompensationTechnique = NONE | BREATH_HOLD | REALTIME | GATING | TRACKING | PHASE_ORDERING
    | PHASE_SCANNING | RETROSPECTIVE | CORRECTION | UNKNOWN
PixelPresentation = MONOCHROME | TRUE_COLOR
VolumetricProperties = VOLUME | SAMPLED | DISTORTED | MIXED
VolumeBasedCalculationTechnique = MAX_IP | MIN_IP | VOLUME_RENDER | SURFACE_RENDER | MPR | CURVED_MPR | NONE | MIXED
ComplexImageComponent = MAGNITUDE | PHASE | REAL | IMAGINARY | MIXED
AcquisitionContrast = DIFFUSION | FLOW_ENCODED | FLUID_ATTENUATED | PERFUSION | PROTON_DENSITY | STIR | TAGGING | T1
    | T2 | T2_STAR | TOF | UNKNOWN | MIXED
AcquisitionType = SEQUENCED | SPIRAL | CONSTANT_ANGLE | STATIONARY | FREE
ReconstructionAlgorithm = FILTER_BACK_PROJ | ITERATIVE | REPROJECTION | RAMLA | MLEM | 2D | 3D
ConvolutionKernelGroup = BRAIN | SOFT_TISSUE | LUNG | BONE | CONSTANT_ANGLE
FilterMaterial = MOLYBDENUM | ALUMINUM | COPPER | RHODIUM | NIOBIUM | EUROPIUM | LEAD | MIXED | SILVER | TIN
EchoPulseSequence = SPIN | GRADIENT | BOTH
SteadyStatePulseSequence = FREE_PRECESSION | TRANSVERSE | TIME_REVERSED | LONGITUDINAL | NONE
SpectrallySelectedSuppression = FAT | WATER | FAT_AND_WATER | SILICON_GEL | NONE
OversamplingPhase = 2D | 3D | 2D_3D | NONE
GeometryOfKSpaceTraversal = RECTILINEAR | RADIAL | SPIRAL
SegmentedKSpaceTraversal = SINGLE | PARTIAL | FULL
RectilinearPhaseEncodeReordering = LINEAR | CENTRIC | SEGMENTED | REVERSE_LINEAR | REVERSE_CENTRIC | UNKNOWN
KSpaceFiltering = COSINE | COSINE_SQUARED | FERMI | GAUSSIAN | HAMMING | HANNING | LORENTZIAN | LRNTZ_GSS_TRNSFM
    | RIESZ | TUKEY | USER | NONE
CoverageOfKSpace = FULL | CYLINDRICAL | ELLIPSOIDAL | WEIGHTED
ResonantNucleus = 1H | 3HE | 7LI | 13C | 19F | 23NA | 31P | 129XE
ApplicableSafetyStandardAgency = IEC | FDA | MHW
GradientOutputType = DB_DT | ELECTRIC_FIELD | PER_NERVE_STIM
InPlanePhaseEncodingDirection = ROW | COLUMN | COL | OTHER
FlowCompensation = ACCELERATION | VELOCITY | OTHER | NONE
Spoiling = RF | GRADIENT | RF_AND_GRADIENT | NONE
SpectrallySelectedExcitation = WATER | FAT | NONE
SpatialPresaturation = SLAB | NONE
ParallelAcquisitionTechnique = PILS | SENSE | SMASH | OTHER
MagnetizationTransfer = ON_RESONANCE | OFF_RESONANCE | NONE
Tagging = GRID | LINE | NONE
ReceiveCoilType = BODY | VOLUME | SURFACE | MULTICOIL
TransmitCoilType = BODY | VOLUME | SURFACE
DiffusionDirectionality = DIRECTIONAL | BMATRIX | ISOTROPIC | NONE
PatientOrientation = A | P | R | L | H | F | AR | AL | AH | AF | PR | PL | PH | PF | RA | RP | RH | RF | LA | LP
    | LH | LF | HA | HP | HR | HL | FA | FP | FR | FL | ARH | ARF | ALH | ALF | AHR | AHL | AFR | AFL | PRH | PRF
    | PLH | PLF | PHR | PHL | PFR | PFL | RAH | RAF | RPH | RPF | RHA | RHP | RFA | RFP | LAH | LAF | LPH | LPF
    | LHA | LHP | LFA | LFP | HAR | HAL | HPR | HPL | HRA | HRP | HLA | HLP | FAR | FAL | FPR | FPL | FRA | FRP
    | FLA | FLP
""")

# ImageType and FrameType (PS3.3 C.7.6.1.1.2): first value, second value, and what may follow.
IMAGE_TYPES: tuple[frozenset[str], frozenset[str], frozenset[str]] = (
    frozenset({"ORIGINAL", "DERIVED", "MIXED"}),
    frozenset({"PRIMARY", "SECONDARY", "MIXED"}),
    _sets("""
FURTHER = ADC | ADD | ANGIO | ANGIO_TIME | ATTENUATION | AVERAGE | AXIAL | BIPLANE A | BIPLANE B | CARDIAC
    | CARDIAC_CTA | CARDIAC_GATED | CARDRESP_GATED | CINE | CONSTANT_ANGLE | CORONAL | CT_SOM5 SPI | CT_SOM5 SEQ
    | CT_SOM5 TOP | CT_SOM7 SPI | CT_SOM7 TOP | DERIVED | DIFFUSION | DIFFUSION_ANISO | DIS2D | DIS3D | DIXON
    | DYNAMIC | EMISSION | FAT | FFE | FILTERED | FLOW_ENCODED | FLUID_ATTENUATED | FLUOROSCOPY | FMRI
    | FOR PRESENTATION | GATED | GATED TOMO | HELICAL | I | IN_PHASE | LEFT | LOCALIZER | LOSSY | M | MAGNITUDE
    | MASK | MAX_IP | MEAN | MIN IP | MIN_IP | MIP | MIXED | MOSAIC | MOTION | MPR | MULTIECHO | M_FFE | ND | M_IR
    | M_SE | NONE | NORM | OPP_PHASE | OTHER | P | PERFUSION | PHASE | PHASE MAP | PROJECTION IMAGE | PROTON_DENSITY
    | QUANTITY | R | REAL | RECON GATED TOMO | RECON TOMO | REFORMATTED | REPROJECTION | RESAMPLED | REST
    | RESP_GATED | RIGHT | SE | SINGLE A | SINGLE B | SINGLE PLANE | STATIC | STDDEV | STIR | STRESS | SUBTRACTION
    | SUM | T1 | T1 MAP | T2 | T2 MAP | T2_STAR | TAGGING | TOF | TOMO | TRACE | TRACEW | TRANSMISSION | VELOCITY
    | VOLUME | WATER | WHOLE BODY
""")["FURTHER"],
)  # fmt: skip

# Word in the header (lower case) -> name that is kept. Any other maker becomes "other".
# The last two are the pretend makers of the phantom hospitals.
MAKERS: Mapping[str, str] = MappingProxyType(
    {
        "agfa": "Agfa",
        "canon": "Canon",
        "carestream": "Carestream",
        "fujifilm": "Fujifilm",
        "ge": "GE",
        "hologic": "Hologic",
        "kodak": "Kodak",
        "konica": "Konica",
        "philips": "Philips",
        "samsung": "Samsung",
        "shimadzu": "Shimadzu",
        "siemens": "Siemens",
        "toshiba": "Toshiba",
        "acme": "Acme",
        "borealis": "Borealis",
    }
)

# Words of a description that say what was done and not to whom; no place, no person, no number but those of a
# sequence's name. A description keeps those it holds, in alphabetical order: the order written could tell more.
WORDS: frozenset[str] = _sets("""
WORDS = 2D | 3D | ABD | ABDOMEN | ADC | ANGIO | AORTA | AP | ARTERIAL | AX | AXIAL | BLADE | BOLUS | BONE | BRAIN
    | BREAST | CARDIAC | CAROTID | CC | CE | CHEST | CINE | CONTRAST | COR | CORONAL | CORONARY | CR | CT | CTA | DCE
    | DELAYED | DIXON | DOSE | DTI | DWI | DX | DYNAMIC | ECHO | EPI | EXPIRATION | FAST | FLAIR | FLASH | FSE | FSPGR
    | GATED | GD | GRE | HEAD | HEART | HIP | HRCT | INSPIRATION | KNEE | LAT | LATERAL | LIVER | LOCALIZER | LOW
    | LUNG | LUNGS | MAMMO | MEDIASTINUM | MG | MIP | MLO | MPR | MPRAGE | MR | MRA | MRI | NATIVE | NECK | NM | OBL
    | PA | PELVIS | PERFUSION | PET | PORTAL | POST | POSTCONTRAST | PRE | PRECONTRAST | PRONE | PROPELLER | PROSTATE
    | RECON | RF | SAG | SAGITTAL | SCOUT | SE | SHOULDER | SKULL | SPACE | SPGR | SPINE | STIR | SUBTRACTION | SUPINE
    | SWI | T1 | T1W | T2 | T2W | THICK | THIN | THORAX | TIRM | TOF | TOPOGRAM | TRA | TRACE | TSE | TWIST | US
    | VENOUS | VIBE | WITH | WITHOUT | XA
""")["WORDS"]

# Codes of regions that SNOMED has since replaced, and that most archives hold: old (SCT, then SRT) -> new.
OLD_CODES: Mapping[str, str] = MappingProxyType(
    {
        "51185008": "816094009",  # chest
        "T-D3000": "816094009",
        "113345001": "818981001",  # abdomen
        "T-D4000": "818981001",
        "12921003": "816092008",  # pelvis
        "T-D6000": "816092008",
    }
)
